#!/usr/bin/env bash
# From an empty folder to a distilled sparse student and a report, on two CPU cores.
#
#   bash speedrun.sh
#
# Two lanes of single-threaded processes run in parallel: a small process gains little from a second thread, and two
# processes of two threads each would compete for two cores. The left lane makes teacher and student, the right lane what
# does not need the teacher. Every step is a plain command; its output goes to out/tiny/logs/. Run again, it continues where
# it stopped.
set -euo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS=1

world=data/tiny
out=out/tiny
mkdir -p $out/logs
touch $out/times.txt

step() {   # step NAME COMMAND...   runs the command once, with its output in a file and its seconds in times.txt
    local name=$1 begin=$SECONDS
    shift
    if ! "$@" > "$out/logs/$name.log" 2>&1; then
        echo "$name failed: $*"
        tail -n 5 "$out/logs/$name.log"
        return 1
    fi
    grep -q "^$name " $out/times.txt || echo "$name $((SECONDS - begin))" >> $out/times.txt
    printf '%4ds  %-16s %s\n' $SECONDS "$name" "$(tail -n 1 "$out/logs/$name.log" | cut -c1-100)"
}

train() {  # train NAME CONFIG [FLAGS]
    step "$1" python train.py "config/tiny/$2.py" "${@:3}"
}

judge() {  # judge NAME...   the benchmarks of the world, then the same in a drawing style kept out of training
    local options="--benchmark=pope,gqa,objhal --batch_size=256 --max_new_tokens=40"
    for name in "$@"; do
        step "judge_$name" python evaluate.py --model=$out/$name --data=$world/bench \
            --out_dir=$out/judged/$name $options
        step "unseen_$name" python evaluate.py --model=$out/$name --data=$world/bench_unseen \
            --out_dir=$out/judged_unseen/$name $options
    done
}

until_there() {      # a file of the other lane
    until [ -f "$1" ]; do sleep 0.5; done
}

until_finished() {   # a run of the other lane
    until grep -qs '"finished": true' "$out/$1/run.json"; do sleep 0.5; done
}

left() {
    step llm_teacher python -m tiny --out_dir=$world --part=llm_teacher
    until_there $world/vision.json
    train teacher_align teacher_align
    train teacher teacher_sft
    until_finished align
    train d2d d2d
    train d2s d2s --micro_batch_size=32
    train pd pd
    judge pd
}

right() {
    step world python -m tiny --out_dir=$world --part=world
    step vision python -m tiny --out_dir=$world --part=vision
    step llm_student python -m tiny --out_dir=$world --part=llm_student
    train align align
    # The controls: the same student by cross-entropy alone, dense and then as sparse as the distilled one ...
    train sft sft
    train sft_sparse d2s --student=$out/sft --teacher= --kd_weight=0.0 --out_dir=$out/sft_sparse --micro_batch_size=32
    judge sft sft_sparse
    until_finished teacher
    judge teacher
    until_finished d2d
    judge d2d
    until_finished d2s
    # ... and preference distillation replaced by cross-entropy on the chosen answers.
    train chosen_only d2s --student=$out/d2s --teacher= --kd_weight=0.0 --out_dir=$out/chosen_only \
        --data=$world/train/pd_chosen.json --micro_batch_size=32 --max_steps=124 --learning_rate=2e-4
    judge d2s chosen_only
}

set -m                                                     # each lane is its own process group
left & left_lane=$!
right & right_lane=$!
stop() { kill -- -$left_lane -$right_lane 2> /dev/null || true; exit 1; }
trap stop INT TERM
# If the first lane to end has failed, the other one would wait for it forever.
wait -n || stop
wait -n || stop
python -m tiny --report=$out
