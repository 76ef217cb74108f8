"""
The arms of the study and the questions that they answer: plain data, read by tools/study.py.

An arm starts from the warm student of its seed (or from another arm), runs one or two stages, and is judged. A stage
is written as its config in config/study/ and what differs from it: "d2d --kd_loss=reverse". {teacher} is the folder
of the model or the rows of that name, of the same seed.
"""
from typing import NamedTuple


class Arm(NamedTuple):
    stages: list[str]
    seeds: int = 6              # it runs on the counted seeds 0 .. seeds - 1; 0: only if it is named, or starts others
    start: str = "warm"


# -----------------------------------------------------------------------------
# What the arms of a seed share: command lines without the flags that all stages get (`command_line` in study.py)

SHARED = {
    "world": ["tiny --part=world"],
    "vision": ["tiny --part=vision"],
    "llm_teacher": ["tiny --part=llm_teacher"],
    "llm_student": ["tiny --part=llm_student"],
    "teacher_align": ["config/tiny/teacher_align.py --vision={vision} --llm={llm_teacher}"
                      " --data={world}/train/align.json"],
    "teacher": ["config/tiny/teacher_sft.py --student={teacher_align} --data={world}/train/teacher.json"
                " --max_steps=1000"],
    # Weak: four tenths of the steps, with a schedule of its own.
    "weak": ["config/tiny/teacher_sft.py --student={teacher_align} --data={world}/train/teacher.json"
             " --max_steps=400"],
    # Never shown a picture together with its text, so all that it can know is which answers are frequent.
    "random": ["config/tiny/teacher_sft.py --student= --vision={vision} --llm={llm_teacher}"
               " --data={world}/train/teacher_shuffled.json --max_steps=400"],
    "warm_align": ["config/study/warm_align.py --vision={vision} --llm={llm_student}"
                   " --data={world}/train/align.json"],
    "warm": ["config/study/warm.py --student={warm_align} --data={world}/train/warm.json"],
    # The teacher's greedy answers to the arms' questions, and two sampled answers to each preference question.
    "answers": ["answer --model={teacher} --data={world}/train/arm.json --temperature=0 --out={answers}/arm.json"],
    "samples": ["answer --model={teacher} --data={world}/train/pd_chosen.json --seed=1 --out={samples}/1.json",
                "answer --model={teacher} --data={world}/train/pd_chosen.json --seed=2 --out={samples}/2.json"],
}
# Of these, the ones that are part of an arm's compute; teachers and the start of all arms are given.
DATA_MAKERS = ["answers", "samples"]


# -----------------------------------------------------------------------------
# The arms

CE_ONLY = "--teacher= --kd_weight=0 --learning_rate=2e-4"        # as config/study/sft.py
ON_PAIRS = "d2s --teacher= --kd_weight=0 --max_steps=60"         # at 5e-4

ARMS = {
    # not trained, judged for comparison
    "teacher": Arm([], 10, start="teacher"),
    "warm": Arm([], 10),
    # one stage of 200 steps: the data's answers, the teacher's distributions
    "sft": Arm(["sft"], 10),
    "kd": Arm(["d2d"], 10),
    # two stages of 120 + 80 steps, with 4 experts of which 2 are active: the paper, and its baseline
    "d2d_first": Arm(["d2d --max_steps=120"], 0),
    "paper": Arm(["d2s"], 10, start="d2d_first"),
    "sft_first": Arm(["sft --max_steps=120"], 0),
    "sft_sparse": Arm([f"d2s {CE_ONLY}"], 10, start="sft_first"),
    # controls of distillation
    "sft_flops": Arm(["sft --max_steps=380"], 10),
    "answers_ce": Arm(["sft --data={answers}/arm.json"], 10),
    "random_teacher": Arm(["d2d --teacher={random}"], 10),
    # Its own copy as teacher: the KL alone is 0 at the start and would train nothing, so with the cross-entropy.
    "own_copy": Arm(["d2d --teacher={warm} --ce_weight=1"], 10),
    # which positions
    "all_text": Arm(["d2d --kd_tokens=all"], 10),
    "image_positions": Arm(["d2d --kd_tokens=response+image"], 10),
    # the second stage dense, or with other experts
    "dense": Arm(["d2d --max_steps=80 --ce_weight=1"], 10, start="d2d_first"),
    "E4T1": Arm(["d2s --top_k=1"], 10, start="d2d_first"),
    "E8T2": Arm(["d2s --num_experts=8"], 10, start="d2d_first"),
    # preference distillation after the paper's two stages; pairs whose chosen answer is true ...
    "dpo_true": Arm(["pd"], 10, start="paper"),
    "dpo_true_self": Arm(["pd --teacher={paper}"], 10, start="paper"),
    "ce_true": Arm([ON_PAIRS + " --data={world}/train/pd_chosen.json"], 10, start="paper"),
    # ... and pairs of two sampled answers
    "dpo_sampled": Arm(["pd --data={samples}/pairs.json"], 10, start="paper"),
    "dpo_sampled_self": Arm(["pd --data={samples}/pairs.json --teacher={paper}"], 10, start="paper"),
    "ce_sampled": Arm([ON_PAIRS + " --data={samples}/chosen.json"], 10, start="paper"),
    # the released code's mask, one position late
    "late": Arm(["d2d --kd_shift=late"], 10),
    "kd_ce": Arm(["d2d --ce_weight=1"], 10),
    "late_ce": Arm(["d2d --ce_weight=1 --kd_shift=late"], 10),
    # wrong answers in the student's rows, where the others have 10 %
    "sft_noise30": Arm(["sft --data={world}/train/arm_noise30.json"]),
    "kd_noise30": Arm(["d2d --data={world}/train/arm_noise30.json"]),
    # the teacher
    "weak_teacher": Arm(["d2d --teacher={weak}"]),
    "weak_then_strong": Arm(["d2d --teacher={weak} --max_steps=100", "d2d --max_steps=100"]),
    # sparse from the first step on, with as many FLOPs as the two stages of `paper`
    "one_stage": Arm(["d2s --max_steps=194"]),
    # divergences
    "reverse": Arm(["d2d --kd_loss=reverse"]),
    "jsd": Arm(["d2d --kd_loss=jsd"]),
    "mse": Arm(["d2d --kd_loss=mse"]),
    # features
    "hidden": Arm(["d2d --hidden_weight=1"]),
    "hidden_alone": Arm(["d2d --hidden_weight=1 --kd_weight=0"]),
    "hidden_ce": Arm(["d2d --hidden_weight=1 --kd_weight=0 --ce_weight=1"]),
    "affinity": Arm(["d2d --affinity_weight=10"]),
    "relation": Arm(["d2d --relation_weight=0.5"]),
    # whose answers
    "answers_kd": Arm(["d2d --data={answers}/arm.json"]),
    "on_policy_half": Arm(["d2d --on_policy=0.5 --on_policy_tokens=40"]),
    "on_policy": Arm(["d2d --on_policy=1 --on_policy_tokens=40"]),
    # half and twice the scenes, in as many steps
    "sft_half": Arm(["sft --data={world}/train/arm_half.json"]),
    "kd_half": Arm(["d2d --data={world}/train/arm_half.json"]),
    "sft_double": Arm(["sft --data={world}/train/arm_double.json"]),
    "kd_double": Arm(["d2d --data={world}/train/arm_double.json"]),
}
# A recipe of our own against the paper's, chosen on tuning seeds, judged on seeds that nothing else has used: one dense stage
# on the teacher's answers, then cross-entropy on the better of two sampled captions, sparse. own_kd: with the teacher.
ARMS["own"] = Arm([ON_PAIRS + " --data={samples}/chosen.json"], 0, start="answers_kd")
ARMS["own_kd"] = Arm(["d2s --max_steps=60 --data={samples}/chosen.json"], 0, start="answers_kd")
OWN_SEEDS = range(20, 30)
# Learning rates, for tuning seeds: one family of losses each. The others are relatives of these.
for _rate in ("2e-4", "5e-4", "1e-3"):
    for _name in ("sft", "kd", "mse", "hidden_ce"):
        ARMS[f"{_name}_lr{_rate}"] = Arm([f"{ARMS[_name].stages[0]} --learning_rate={_rate}"], 0)
for _rate in ("1e-4", "2e-4", "5e-4"):
    for _name in ("dpo_sampled", "ce_sampled"):
        ARMS[f"{_name}_lr{_rate}"] = Arm([f"{ARMS[_name].stages[0]} --learning_rate={_rate}"], 0, start="paper")


# -----------------------------------------------------------------------------
# The questions

class Claim(NamedTuple):
    """arm minus reference, in `metric`."""
    arm: str
    reference: str
    says: str = ""              # what a paper reports
    sign: int = 0               # of that: +1 the arm's number is higher, -1 lower, 0 no claim, or none of a difference
    metric: str = "score"


class Question(NamedTuple):
    title: str
    claims: list[Claim]         # the family of Holm's correction
    seeds: range = range(10)


QUESTIONS = [
    Question("Does distillation help?", [
        Claim("kd", "sft", "LLaVA-MoD, Table 6: 60.2 against 55.7", 1),
        Claim("paper", "sft_sparse", "LLaVA-MoD, Table 6: 60.2 against 55.7", 1),
        Claim("kd", "sft_flops"),
        Claim("kd", "answers_ce"),
        Claim("random_teacher", "sft"),
        Claim("own_copy", "sft"),
    ]),
    Question("Does it help more where answers are wrong?", [
        Claim("kd", "sft"),
        Claim("kd_noise30", "sft_noise30"),
    ]),
    Question("The response, or everything?", [
        Claim("all_text", "kd", "LLaVA-MoD, Table 7: 58.4 against 60.2", -1),
        Claim("image_positions", "kd", "LLaVA-KD: +0.5", 1),
    ]),
    Question("Sparse or dense?", [
        Claim("paper", "dense", "LLaVA-MoD, Table 8: sparse is better", 1),
        Claim("E4T1", "dense", "LLaVA-MoD, Table 8: 59.2 against 57.1", 1),
        Claim("E8T2", "dense"),
    ]),
    Question("How good a teacher?", [
        Claim("weak_teacher", "kd", "LLaVA-MoD, Table 9: a stronger one is better", -1),
        Claim("weak_teacher", "sft"),
        Claim("weak_then_strong", "kd", "LLaVA-CKD: better than strong alone", 1),
    ]),
    Question("What does preference distillation change?", [
        Claim("dpo_true", "paper", "LLaVA-MoD, Tables 3 and 5: less hallucination", -1, "resp"),
        Claim("dpo_sampled", "paper", "LLaVA-MoD, Tables 3 and 5: less hallucination", -1, "resp"),
        Claim("dpo_true", "ce_true", metric="resp"),
        Claim("dpo_sampled", "ce_sampled", metric="resp"),
        Claim("dpo_sampled", "ce_sampled", metric="phantom"),
        Claim("dpo_sampled", "ce_sampled", metric="coverage"),
        Claim("dpo_true", "dpo_true_self", metric="resp"),
        Claim("dpo_sampled", "dpo_sampled_self", metric="resp"),
        Claim("dpo_sampled", "dpo_sampled_self", metric="coverage"),
    ]),
    Question("One stage or two?", [
        Claim("one_stage", "paper", 'LLaVA-MoD: "progressive"', -1),
    ]),
    Question("Which divergence?", [
        Claim("reverse", "kd"),
        Claim("jsd", "kd"),
        Claim("mse", "kd"),
        Claim("reverse", "kd", metric="kl"),
        Claim("jsd", "kd", metric="kl"),
    ]),
    Question("Do features help?", [
        Claim("hidden", "kd", "LLaVADI: 50.7 against 49.8, one run", 1),
        Claim("hidden_ce", "sft", "LLaVADI: helps", 1),
        Claim("hidden_alone", "kd"),
        Claim("affinity", "kd", "LLaVADI: adds little"),
        Claim("relation", "kd", "LLaVA-KD: helps", 1),
    ]),
    Question("Whose answers?", [
        Claim("answers_ce", "sft", "LLaVADI: the teacher's are better", 1),
        Claim("answers_kd", "kd", "LLaVADI: the teacher's are better", 1),
        Claim("on_policy_half", "kd", "GKD: better", 1),
        Claim("on_policy", "kd", "GKD: better", 1),
    ]),
    Question("What does the released mask cost?", [
        Claim("late", "kd"),
        Claim("late_ce", "kd_ce"),
        Claim("late_ce", "sft"),
    ]),
    Question("How much data?", [
        Claim("kd_half", "sft_half"),
        Claim("kd", "sft"),
        Claim("kd_double", "sft_double"),
        Claim("kd_half", "sft"),
    ]),
    Question("Does it carry over to a drawing style never seen?", [
        Claim("kd", "sft", metric="unseen_score"),
        Claim("paper", "sft_sparse", metric="unseen_score"),
        Claim("kd", "answers_ce", metric="unseen_score"),
    ]),
    Question("Is there a better recipe than the paper's (d2d, d2s, pd on sampled pairs)?", [
        Claim("own", "dpo_sampled"),
        Claim("own", "dpo_sampled", metric="mean4"),
        Claim("own", "dpo_sampled", metric="resp"),
        Claim("own", "dpo_sampled", metric="coverage"),
        Claim("own", "paper"),
    ], OWN_SEEDS),
]
DATA_CURVE = {"sft": ["sft_half", "sft", "sft_double"], "kd": ["kd_half", "kd", "kd_double"]}
