# The tiny world's teacher, first half: the adaptor alone, on captions.
#   python train.py config/tiny/teacher_align.py
stage = "align"
vision = "data/tiny/base/vision"
llm = "data/tiny/base/llm_teacher"
data = "data/tiny/train/align.json"
image_dir = "data/tiny/train/images"
out_dir = "out/tiny/teacher_align"

dtype = "float32"           # below width 128, bf16 is slower than fp32 on a CPU
batch_size = 16
micro_batch_size = 16
max_steps = 120
learning_rate = 1.5e-3
grad_clip = 1.0
max_length = 128
