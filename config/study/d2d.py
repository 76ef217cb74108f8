# The same student, rows and steps as sft.py, by the KL to the teacher's distributions.
#   python -m tools.study --arms=kd --seeds=100 --results=out/study.jsonl    what it starts from, then this
#   python train.py config/study/d2d.py --seed=100 --out_dir=out/mine/d2d    after that, this alone
stage = "d2d"
student = "out/study/seed_100/warm"
teacher = "out/study/seed_100/teacher"
data = "out/study/seed_100/world/train/arm.json"
image_dir = "out/study/seed_100/world/train/images"
out_dir = "out/study/seed_100/kd"

dtype = "float32"
batch_size = 32
micro_batch_size = 32
max_steps = 200
learning_rate = 5e-4
grad_clip = 1.0
max_length = 128
