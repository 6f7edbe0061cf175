"""Verifiable tasks: prompts, answers and verifiers that never execute model output.

    from uncollapse import tasks

    task = tasks.task("modsum")
    rows = task.rows(64)                                     # prompt, answer, and what the reward needs
    task.reward(prompts=..., completions=..., **columns)     # TRL's signature

A reward gives 1.0 for right, 0.0 for wrong and None where nothing can be said.
"""

from uncollapse.tasks.answers import completion_text, final_answer, same_answer
from uncollapse.tasks.datasets import DatasetTask, exact_reward, from_dataset
from uncollapse.tasks.gym import GymTask
from uncollapse.tasks.registry import register_task, task, task_names, tasks
from uncollapse.tasks.task import GeneratedTask, Row, Task, conversational

__all__ = [
    "DatasetTask",
    "GeneratedTask",
    "GymTask",
    "Row",
    "Task",
    "completion_text",
    "conversational",
    "exact_reward",
    "final_answer",
    "from_dataset",
    "register_task",
    "same_answer",
    "task",
    "task_names",
    "tasks",
]
