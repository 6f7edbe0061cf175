#!/usr/bin/env bash
# Train with a recipe in verl. One node: run this. Several: start Ray on all of them first, then run this on one (see docs/verl.md).
#   RECIPE=clip-cov MODEL=/models/Qwen2.5-7B TRAIN=/data/train.parquet VAL=/data/val.parquet bash verl.sh [more verl options]
set -euo pipefail
: "${RECIPE:=clip-cov}" "${NODES:=1}" "${GPUS:=8}" "${MODEL:?path or Hub id of the model}" "${TRAIN:?}" "${VAL:?}"

exec python -m uncollapse.integrations.verl.main \
  uncollapse.recipe="$RECIPE" \
  data.train_files="$TRAIN" data.val_files="$VAL" \
  data.train_batch_size=128 data.max_prompt_length=1024 data.max_response_length=4096 \
  actor_rollout_ref.model.path="$MODEL" \
  actor_rollout_ref.model.use_remove_padding=true \
  actor_rollout_ref.model.enable_gradient_checkpointing=true \
  actor_rollout_ref.actor.strategy=fsdp2 \
  actor_rollout_ref.actor.optim.lr=1e-6 \
  actor_rollout_ref.actor.ppo_mini_batch_size=32 \
  actor_rollout_ref.actor.use_dynamic_bsz=true \
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 \
  actor_rollout_ref.rollout.name=vllm \
  actor_rollout_ref.rollout.n=8 \
  actor_rollout_ref.rollout.temperature=1.0 \
  actor_rollout_ref.rollout.gpu_memory_utilization=0.6 \
  trainer.nnodes="$NODES" trainer.n_gpus_per_node="$GPUS" \
  trainer.total_epochs=1 trainer.save_freq=20 trainer.test_freq=20 \
  "$@"
