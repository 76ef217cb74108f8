# The baseline of Table 6: the same student and data as d2d.py, trained with cross-entropy on the data's own answers.
#
#   torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py config/sft.py
#   (the same line on two machines of 8 GPUs; HOST is one of them)
#   torchrun --nproc_per_node=16 train.py config/d2s.py --student=out/2b/sft --teacher= --kd_weight=0.0 --out_dir=out/2b/sft_sparse
#
# The last line makes it sparse on the rows of d2s.py, again without a teacher, so that both students have seen the same
# rows; if d2s ran with another --data, give it that, too. (The official script for this baseline passes the module names
# of another Qwen and may have trained the routers only; Table 6 could be affected.) Hardware: 16 A100s of 80 GB.
stage = "sft"
student = "out/2b/align"
data = ",".join([
    "data/d2d/allava_laion/ALLaVA-Caption-LAION-4V.json",
    "data/d2d/share-captioner_coco_lcs_sam_1246k_1107.json",
    "data/d2d/train_json/svit_tune_157k.json",
    "data/d2d/train_json/lvis_tune_220k_.json",
    "data/d2d/train_json/lrv_tune_331k.json",
    "data/d2d/train_json/la_tune_256k.json",
])
image_dir = "data/images"
out_dir = "out/2b/sft"

batch_size = 128                # 16 GPUs x 4 rows x 2 micro-batches, as in d2d.py
max_steps = 18750
micro_batch_size = 4
learning_rate = 2e-5
max_length = 2048
num_workers = 4
save_every = 1000
