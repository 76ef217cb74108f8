# Stage 2 on the tiny world: the dense student imitates the teacher's distributions.
#   python train.py config/tiny/d2d.py
stage = "d2d"
student = "out/tiny/align"
teacher = "out/tiny/teacher"
data = "data/tiny/train/d2d.json"
image_dir = "data/tiny/train/images"
out_dir = "out/tiny/d2d"

dtype = "float32"
batch_size = 32
micro_batch_size = 32
max_steps = 500             # 32 x 500 = 3.2 times over 5,000 rows, 3 in 10 of whose answers are wrong
learning_rate = 2e-3
grad_clip = 1.0
max_length = 128
