# Stage 1, the paper's "Initialization": a fresh adaptor is trained to map image features into Qwen1.5-1.8B (eq. 5).
#
#   torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py config/align.py
#   (the same line on two machines of 8 GPUs; HOST is one of them)
#
# Reproduces: row "Stage-1" of the paper's Table 11. Hardware: 16 A100s of 80 GB.
# Where the sources disagree:
#   batch          main text 512, Table 11 256, script 8 x 2 x GPUs = 256 at 16 GPUs   -> Table 11
#   learning rate  paper 1e-4, script 1e-3 (as LLaVA)                                  -> paper
#   AdamW          Table 11 betas (0.9, 0.98), eps 1e-6; scripts: torch's defaults     -> Table 11
#   image          script resizes and crops the center, all later stages pad           -> pad, everywhere
#   template       LLaVA uses a bare caption here, the script the conversation         -> the conversation
stage = "align"
vision = "weights/openai/clip-vit-large-patch14-336"
llm = "weights/Qwen/Qwen1.5-1.8B"
template = "vicuna"
data = "data/align/blip_laion_cc_sbu_558k.json"   # LLaVA-1.5-Pretrain, 558k captions (the paper says 0.6M)
image_dir = "data/align/images"
out_dir = "out/2b/align"

batch_size = 256           # 16 GPUs x 8 rows x 2 micro-batches; 558,128 rows / 256 = 2,180 steps
micro_batch_size = 8
learning_rate = 1e-4
max_length = 2048          # image positions included
num_workers = 8
save_every = 500
