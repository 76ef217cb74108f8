# Preference distillation after d2s.py.
#   python -m tools.study --arms=dpo_true --seeds=100 --results=out/study.jsonl    what it starts from, then this
#   python train.py config/study/pd.py --seed=100 --out_dir=out/mine/pd            after that, this alone
stage = "pd"
student = "out/study/seed_100/paper"
teacher = "out/study/seed_100/teacher"
data = "out/study/seed_100/world/train/pd.json"
image_dir = "out/study/seed_100/world/train/images"
out_dir = "out/study/seed_100/dpo_true"

dtype = "float32"
batch_size = 32
micro_batch_size = 32
max_steps = 60
learning_rate = 2e-4
grad_clip = 1.0
max_length = 128
