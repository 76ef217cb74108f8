# Stage 4, preference distillation: DPO whose reference model is the teacher (eq. 8).
#
#   torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py config/pd.py
#   (the same line on two machines of 8 GPUs; HOST is one of them)
#
# Reproduces: Tables 4 and 5. Hardware: 16 A100s of 80 GB. Table 11 does not list this stage.
# Where the sources disagree:
#   loss      the paper's eq. 8 is DPO; the released script runs kto_pair              -> DPO (preference_loss="sigmoid")
#   beta      not in the paper; 0.1 in the code                                        -> 0.1
#   batch     main text 256, script 1 x 8 x GPUs = 128 at 16 GPUs                      -> the script, as in Table 11's stages
#   rows      paper 0.8M, guide 80,000, the public dataset 83,132                      -> the dataset, all of it
stage = "pd"
student = "out/2b/d2s"
teacher = "out/teacher/sft"
data = "data/pd/rlaif_v.json"   # RLAIF-V; its own columns are read as they are
image_dir = "data/pd/images"
out_dir = "out/2b/pd"

preference_loss = "sigmoid"
beta = 0.1
balance_coef = 0.01

batch_size = 128                # 16 GPUs x 1 pair (2 rows) x 8 micro-batches; 83,132 pairs / 128 = 649 steps
micro_batch_size = 1
learning_rate = 2e-6
max_length = 2048
num_workers = 4
save_every = 200
