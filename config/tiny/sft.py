# The control of Table 6 on the tiny world: the same student and data as d2d.py, by cross-entropy.
#   python train.py config/tiny/sft.py
# and then, as sparse as the distilled one:
#   python train.py config/tiny/d2s.py --student=out/tiny/sft --teacher= --kd_weight=0.0 \
#       --out_dir=out/tiny/sft_sparse
stage = "sft"
student = "out/tiny/align"
data = "data/tiny/train/d2d.json"
image_dir = "data/tiny/train/images"
out_dir = "out/tiny/sft"

dtype = "float32"
batch_size = 32
micro_batch_size = 32
max_steps = 700             # without a teacher to run, they take about as long as the 500 of d2d.py
learning_rate = 2e-3
grad_clip = 1.0
max_length = 128
