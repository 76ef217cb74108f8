# Your own pictures, from a finished LLaVA of yours or this project's: docs/own-data.md says which stages to run, and in which order.
#
#   python train.py config/own.py --student=out/2b/pd                                          more training on your rows
#   python train.py config/own.py --stage=d2d --student=... --teacher=... --out_dir=...        the same with a teacher
#   python train.py config/own.py --stage=d2s --student=... --teacher=... --out_dir=...        and sparse
#
# For a few hundred rows; section 3 of the page has the flags for 50, 5,000 and 500,000. Rows are LLaVA's JSON;
# python -m tools.check --data=data/own/rows.json --image_dir=data/own/images checks them first.
stage = "sft"
student = "out/teacher/sft"
data = "data/own/rows.json"
image_dir = "data/own/images"
out_dir = "out/own/sft"

skip_bad_rows = False           # True: train without the rows that are wrong, and list them in out_dir/bad_rows.jsonl
val_rows = 32                   # never trained on; the loss on them says when to stop
val_every = 50
batch_size = 16
micro_batch_size = 2
epochs = 3
learning_rate = 1e-5            # from a finished model; 2e-5 from an adaptor that was only aligned
grad_clip = 1.0
max_length = 2048
num_workers = 4
save_every = 200
log_every = 5
