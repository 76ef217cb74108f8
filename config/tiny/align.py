# Stage 1 on the tiny world: the student's adaptor, on captions.
#   python train.py config/tiny/align.py
stage = "align"
vision = "data/tiny/base/vision"
llm = "data/tiny/base/llm_student"
data = "data/tiny/train/align.json"
image_dir = "data/tiny/train/images"
out_dir = "out/tiny/align"

dtype = "float32"
batch_size = 32
micro_batch_size = 32
max_steps = 100             # 32 x 100 = twice over 1,500 captions
learning_rate = 2e-3
grad_clip = 1.0
max_length = 128
