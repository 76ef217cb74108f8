# The teacher, first half: LLaVA-1.5's pretraining of the adaptor, with Qwen1.5-7B as the language model.
#
#   torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py config/teacher_align.py
#   (the same line on two machines of 8 GPUs; HOST is one of them)
#
# Reproduces: LLaVA-1.5's recipe (arXiv 2310.03744) with another LLM, which is all that the paper says of its teachers.
# Hardware: 16 A100s of 80 GB (nothing but the adaptor has gradients).
# LLaVA uses a bare caption without a conversation here; we use the template of all other stages, so that one checkpoint
# has one template.
stage = "align"
vision = "weights/openai/clip-vit-large-patch14-336"
llm = "weights/Qwen/Qwen1.5-7B"
template = "vicuna"             # the student's: distillation compares token by token
data = "data/align/blip_laion_cc_sbu_558k.json"
image_dir = "data/align/images"
out_dir = "out/teacher/align"

batch_size = 256                # 16 GPUs x 4 rows x 4 micro-batches; 558,128 rows / 256 = 2,180 steps
micro_batch_size = 4
learning_rate = 1e-3
beta2 = 0.999                   # LLaVA-1.5's AdamW, not the paper's Table 11
eps = 1e-8
max_length = 2048
num_workers = 8
save_every = 500
