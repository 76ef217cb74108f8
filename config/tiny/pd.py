# Stage 4 on the tiny world: DPO against the teacher.
#   python train.py config/tiny/pd.py
stage = "pd"
student = "out/tiny/d2s"
teacher = "out/tiny/teacher"
data = "data/tiny/train/pd.json"
image_dir = "data/tiny/train/images"
out_dir = "out/tiny/pd"

dtype = "float32"
batch_size = 32
micro_batch_size = 32
max_steps = 124             # 32 x 124 = once over 4,000 pairs
learning_rate = 1e-4        # twice as much, or a second pass over the pairs, costs coverage: captions run on or stop early
grad_clip = 1.0
max_length = 128
