#!/usr/bin/env bash
# From nothing to a trained, merged, evaluated LISAT that answers questions about a picture: bash quickstart.sh
# Needs Python 3.11+; makes .venv itself. No GPU, no download besides the Python packages, no compiler.
# Shorter or longer: QUICKSTART_STEPS, QUICKSTART_SCENES; another place for the results: QUICKSTART_DIR.
set -euo pipefail
cd "$(dirname "$0")"
source scripts/setup_env.sh

out=${QUICKSTART_DIR:-runs/quickstart}
scenes=${QUICKSTART_SCENES:-1500}
steps=${QUICKSTART_STEPS:-600}
tests=$((scenes / 10 < 150 ? scenes / 10 : 150))
export OMP_NUM_THREADS=1

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

say "1/5 Drawing $scenes scenes with questions whose words alone decide the mask"
"$PYTHON_VENV" scripts/draw_scenes.py --out "$out/data/synthetic" --train "$scenes" --val 20 --test "$tests"

say "2/5 Training LISAT with LoRA from the small bases ($steps steps, DeepSpeed, two processes)"
rm -rf "$out/lisat"
"$PYTHON_VENV" -m torch.distributed.run --standalone --nproc_per_node 2 train_lisat.py --config lisat_tiny \
    --dataset_dir "$out/data" --log_base_dir "$out" --exp_name lisat --epochs 1 --steps_per_epoch "$steps"

say "3/5 Merging"
bash merge_lora_weight.sh "$out/lisat" "$out/lisat/hg_model"

say "4/5 Evaluating on $tests scenes it has never seen"
"$PYTHON_VENV" eval_lisat.py --cmd inference --pretrained_model_path "$out/lisat/hg_model" \
    --dataset_dir "$out/data" --val_dataset "synthetic|test" --shuffle_questions --restart \
    --vis_save_path "$out/eval"

say "5/5 Asking three questions about a new scene"
"$PYTHON_VENV" scripts/draw_scenes.py --out "$out/new" --train 0 --val 0 --test 1 --seed 20261
mapfile -t questions < <("$PYTHON_VENV" scripts/draw_scenes.py --list_questions "$out/new/test" | head -n 3)
"$PYTHON_VENV" demo.py --pretrained_model_path "$out/lisat/hg_model" --image "$out/new/test/images/000000.png" \
    --vis_save_dir "$out/demo" --question "${questions[@]}"

say "Done"
cat "$out"/eval/*.md
echo "Training curves and log:  $out/lisat (tensorboard --logdir $out/lisat/tb)"
echo "Predictions drawn:        $(ls "$out"/eval/*.png 2>/dev/null | tr '\n' ' ')"
echo "Answers drawn:            $(find "$out/demo" -name '*.png' | sort | tr '\n' ' ')"
