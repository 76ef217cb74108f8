# Stage 3 on the tiny world: layers 0 and 2 are upcycled to 4 experts, 2 active.
#   python train.py config/tiny/d2s.py
stage = "d2s"
student = "out/tiny/d2d"
teacher = "out/tiny/teacher"
data = "data/tiny/train/d2s.json"
image_dir = "data/tiny/train/images"
out_dir = "out/tiny/d2s"

dtype = "float32"
batch_size = 32
micro_batch_size = 16       # so that two processes can share a step
max_steps = 300
learning_rate = 2e-3
grad_clip = 1.0
max_length = 128
