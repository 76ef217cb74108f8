# The tiny world's teacher, second half: language model and adaptor, on 3 captions and 7 questions per picture.
#   python train.py config/tiny/teacher_sft.py
stage = "sft"
student = "out/tiny/teacher_align"
data = "data/tiny/train/teacher.json"
image_dir = "data/tiny/train/images"
out_dir = "out/tiny/teacher"

dtype = "float32"
batch_size = 32
micro_batch_size = 32
max_steps = 600             # 32 x 600 = 19,200 of 60,000 rows
learning_rate = 1.5e-3      # small batches with more steps beat large ones here
grad_clip = 1.0
max_length = 128
