# The study's warm student, first half: the adaptor, on captions. One per seed.
#   python -m tools.study --arms=warm --seeds=100 --results=out/study.jsonl                what it starts from, then this
#   python train.py config/study/warm_align.py --seed=100 --out_dir=out/mine/warm_align    after that, this alone
stage = "align"
vision = "out/study/seed_100/world/base/vision"
llm = "out/study/seed_100/world/base/llm_student"
data = "out/study/seed_100/world/train/align.json"
image_dir = "out/study/seed_100/world/train/images"
out_dir = "out/study/seed_100/warm_align"

dtype = "float32"
batch_size = 32
micro_batch_size = 32
max_steps = 60
learning_rate = 2e-3
grad_clip = 1.0
max_length = 128
