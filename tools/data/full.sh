#!/usr/bin/env bash
# The commands that make data/full, with the published sizes. `make data SIZE=full` runs them one phase (##) after the other, records
# the times, and then makes the tables. If it is interrupted, the same command continues. Comments give measured times, if known.
#
# Not included: the published LLCs at all 190 x 5 checkpoints (about 2e17 floating-point operations), and the runs of Carroll et al.
set -euo pipefail
export LOCAL_ROOT=${LOCAL_ROOT:-runs} RUNS=${LOCAL_ROOT:-runs}
DIVERSITIES="1 2 4 8 16 32 64 128 256 512 1024 2048 4096 8192 16384 32768 65536 131072 262144 524288 1048576 inf"

## train the quickstart
# Measured: 3 minutes on two CPU cores.
icl train --preset quickstart

## train L2H4, five seeds
# 500,000 steps and 190 checkpoints for each seed. Extrapolated from data/small: 4 to 5 hours per seed on one CPU core. On a GPU
# the five seeds are trained together; this has not been measured.
icl train --preset L2H4 --model.double_residual true --run_name L2H4 --population.seeds 0,1,2,3,4

## evaluate L2H4, five seeds
# Extrapolated from data/small: 15 minutes per seed on one CPU core.
for seed in 0 1 2 3 4; do icl evaluate "$RUNS/L2H4/seed=$seed" --num_prompts 8192 --num_ood_prompts 2048; done

## LLCs of L2H4, seed 1, with the published sampler
# Twelve of the 190 steps, 10 chains of 5,000 moves on 1,024 prompts. Not measured yet.
icl llc "$RUNS/L2H4/seed=1" --published --steps 0,118,1124,1465,3247,9375,20202,40404,60606,126262,318181,500000 || test $? -eq 1

## LLCs of L2H4, seed 1, with the preset's sampler
# The preset: 8 chains of 120 + 400 moves on 1,024 prompts. Not measured yet.
icl llc "$RUNS/L2H4/seed=1" --steps 0,118,1124,1465,3247,9375,20202,40404,60606,126262,318181,500000

## train the ladder
# 22 runs of 500,000 steps. Not measured yet.
icl train --preset L2H4 --model.double_residual true --run_name ladder --population.num_tasks "${DIVERSITIES// /,}"

## evaluate the ladder
# Not measured yet.
for m in $DIVERSITIES; do icl evaluate "$RUNS/ladder/num_tasks=$m" --num_prompts 4096 --num_ood_prompts 2048; done

## evaluate the quickstart
icl evaluate "$RUNS/quickstart" --num_prompts 4096

## test the sampler on known answers
icl llc --self-test --out "$RUNS/known-answers.csv"

## LLCs of the quickstart
icl llc "$RUNS/quickstart"

## calibrate the sampler of the quickstart
# Measured: 3 minutes on two CPU cores.
icl llc "$RUNS/quickstart" --calibrate

## essential dynamics of the quickstart
icl analyse "$RUNS/quickstart" --what essential-dynamics

## embeddings and attention of the quickstart
icl analyse "$RUNS/quickstart" --what embeddings
icl analyse "$RUNS/quickstart" --what attention

## gradients of the quickstart
icl analyse "$RUNS/quickstart" --what gradients

## behaviour and stages of the quickstart
icl analyse "$RUNS/quickstart" --what behaviour
icl analyse "$RUNS/quickstart" --what stages

## essential dynamics of L2H4, five seeds
for seed in 0 1 2 3 4; do icl analyse "$RUNS/L2H4/seed=$seed" --what essential-dynamics; done

## embeddings and attention of L2H4, five seeds
for seed in 0 1 2 3 4; do
    icl analyse "$RUNS/L2H4/seed=$seed" --what embeddings
    icl analyse "$RUNS/L2H4/seed=$seed" --what attention
done

## gradients and Hessian of L2H4, seed 1
icl analyse "$RUNS/L2H4/seed=1" --what gradients
icl analyse "$RUNS/L2H4/seed=1" --what hessian --num_prompts 1024

## behaviour and stages of L2H4, five seeds
for seed in 0 1 2 3 4; do
    icl analyse "$RUNS/L2H4/seed=$seed" --what behaviour
    icl analyse "$RUNS/L2H4/seed=$seed" --what stages
done

## essential dynamics of the ladder, together
finite=$(printf "$RUNS/ladder/num_tasks=%s," ${DIVERSITIES% inf})
icl analyse "$RUNS/ladder/num_tasks=inf" --what essential-dynamics --distribution first_task --jointly_with "${finite%,}"
