import subprocess
import sys

import pytest

from uncollapse.errors import ConfigError, UnknownName
from uncollapse.tasks import register_task, task, task_names


def test_importing_tasks_and_models_imports_nothing_heavy():
    code = (
        "import sys, uncollapse.tasks, uncollapse.models;"
        "print([m for m in ('torch', 'transformers', 'reasoning_gym', 'datasets', 'pyarrow', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names():
    assert {"modsum", "countdown", "running-maximum"} <= set(task_names())
    assert task("modsum").name == "modsum"


def test_unknown_name_offers_the_nearest():
    with pytest.raises(UnknownName, match="unknown task 'modsun'; did you mean modsum"):
        task("modsun")


def test_registering_twice_raises():
    with pytest.raises(ConfigError, match="already registered"):
        register_task("modsum", task)


@pytest.mark.parametrize("name", ["reasoning-gym:mine", "mine.jsonl", "owner/mine"])
def test_names_that_mean_something_else_are_refused(name):
    with pytest.raises(ConfigError, match="would be read as"):
        register_task(name, task)
