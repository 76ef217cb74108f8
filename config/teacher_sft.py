# The teacher, second half: LLaVA-1.5's visual instruction tuning of the whole 7B model.
#
#   torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py config/teacher_sft.py
#   (the same line on two machines of 8 GPUs; HOST is one of them)
#
# Reproduces: the row "teacher, Qwen-1.5-7B" of the paper's Table 1 (average 62.1).
# Hardware: 16 A100s. Weights, gradients and Adam's moments of 7.7B parameters take 16 bytes each, 124 GB: too much for one
# GPU, so they are sharded over the 16 (parallel = "fsdp"). Instead of this run's result, out/teacher/sft may hold any other
# LLaVA folder with Qwen1.5-7B, CLIP-L/14-336 and "template": "vicuna" in its config.json.
stage = "sft"
student = "out/teacher/align"
data = "data/teacher/llava_v1_5_mix665k.json"
image_dir = "data/teacher/images"
out_dir = "out/teacher/sft"

batch_size = 128                # 16 GPUs x 8 rows; 665,298 rows / 128 = 5,197 steps
micro_batch_size = 8            # FSDP sends all weights and gradients once per micro-batch: 8 of one row would send 8 times as much
learning_rate = 2e-5
beta2 = 0.999                   # LLaVA-1.5's AdamW
eps = 1e-8
max_length = 2048
parallel = "fsdp"
checkpointing = True
num_workers = 4
save_every = 1000
