# The study's warm student, second half. From scratch a student stays at chance on yes/no and color for hundreds of
# steps and then gets both within about 100; when, is chance, and would hide what the arms differ in. So every arm of a
# seed starts behind that point, from this student, and is trained on other scenes.
#   python -m tools.study --arms=warm --seeds=100 --results=out/study.jsonl    what it starts from, then this
#   python train.py config/study/warm.py --seed=100 --out_dir=out/mine/warm    after that, this alone
stage = "sft"
student = "out/study/seed_100/warm_align"
data = "out/study/seed_100/world/train/warm.json"
image_dir = "out/study/seed_100/world/train/images"
out_dir = "out/study/seed_100/warm"

dtype = "float32"
batch_size = 16
micro_batch_size = 16
max_steps = 450             # 16 x 450 = 2.1 times over 3,500 rows; more for seeds that need it (docs/study.md)
learning_rate = 2e-3
grad_clip = 1.0
max_length = 128
