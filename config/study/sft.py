# The study's reference: the warm student on an arm's 700 rows, by cross-entropy.
#   python -m tools.study --arms=sft --seeds=100 --results=out/study.jsonl    what it starts from, then this
#   python train.py config/study/sft.py --seed=100 --out_dir=out/mine/sft     after that, this alone
stage = "sft"
student = "out/study/seed_100/warm"
data = "out/study/seed_100/world/train/arm.json"
image_dir = "out/study/seed_100/world/train/images"
out_dir = "out/study/seed_100/sft"

dtype = "float32"
batch_size = 32
micro_batch_size = 32
max_steps = 200             # 32 x 200 = 9.1 times over 700 rows
learning_rate = 2e-4
grad_clip = 1.0
max_length = 128
