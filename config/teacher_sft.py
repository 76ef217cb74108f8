# The teacher, second half: LLaVA-1.5's visual instruction tuning of the whole 7B model.
#
#   torchrun --nproc_per_node=16 train.py config/teacher_sft.py
#
# Reproduces: the row "teacher, Qwen-1.5-7B" of the paper's Table 1 (average 62.1).
# Hardware: this is the one stage that does not fit plain data parallelism. Weights, gradients and Adam states of 7.7B
# parameters in fp32 take 16 bytes each, 124 GB a GPU. Until the loop can shard them, train the teacher elsewhere: any
# LLaVA folder with Qwen1.5-7B, CLIP-L/14-336 and "template": "vicuna" in its config.json can stand in out/teacher/sft.
stage = "sft"
student = "out/teacher/align"
data = "data/teacher/llava_v1_5_mix665k.json"
image_dir = "data/teacher/images"
out_dir = "out/teacher/sft"

batch_size = 128                # 16 GPUs x 1 row x 8 micro-batches; 665,298 rows / 128 = 5,197 steps
micro_batch_size = 1
learning_rate = 2e-5
beta2 = 0.999                   # LLaVA-1.5's AdamW
eps = 1e-8
max_length = 2048
num_workers = 4
save_every = 1000
