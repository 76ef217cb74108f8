# LLaVADI's recipe on the tiny world: d2d.py plus cross-entropy, standardized logits on all text, and last hidden states.
#   python train.py config/tiny/llavadi.py
# Every other signal is d2d.py or d2s.py with one or two flags: docs/signals.md.
stage = "d2d"
student = "out/tiny/align"
teacher = "out/tiny/teacher"
data = "data/tiny/train/d2d.json"
image_dir = "data/tiny/train/images"
out_dir = "out/tiny/llavadi"

ce_weight = 1.0
kd_tokens = "all"
kd_standardize = True
hidden_weight = 1.0
hidden_tokens = "all"

dtype = "float32"
batch_size = 32
micro_batch_size = 32
max_steps = 500             # as d2d.py
learning_rate = 2e-3
grad_clip = 1.0
max_length = 128
