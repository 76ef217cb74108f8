# The second stage of two: 120 steps of d2d.py, then these.
#   python -m tools.study --arms=paper --seeds=100 --results=out/study.jsonl    what it starts from, then this
#   python train.py config/study/d2s.py --seed=100 --out_dir=out/mine/d2s       after that, this alone
stage = "d2s"
student = "out/study/seed_100/d2d_first"
teacher = "out/study/seed_100/teacher"
data = "out/study/seed_100/world/train/arm.json"
image_dir = "out/study/seed_100/world/train/images"
out_dir = "out/study/seed_100/paper"

dtype = "float32"
batch_size = 32
micro_batch_size = 32
max_steps = 80
learning_rate = 5e-4
grad_clip = 1.0
max_length = 128
