#!/usr/bin/env bash
# The commands that make data/small, in an evening on two CPU cores. `make data` runs them one phase (##) after the other, records
# the times, and then makes the tables. If it is interrupted, the same command continues. To run them by hand: bash tools/data/small.sh
#
# This is less than what was published: tools/data/published-run.sh makes the tables of L2H4. The ladder, a set of runs that differ in the number
# of tasks M, has the other settings of the quickstart. There are fewer LLC chains, they are shorter, and their minibatches are smaller.
set -euo pipefail
export LOCAL_ROOT=${LOCAL_ROOT:-runs} RUNS=${LOCAL_ROOT:-runs}
DIVERSITIES="1 2 4 8 16 32 64 128 256 512 1024 inf"

## train the quickstart
icl train --preset quickstart

## train the ladder
icl train --preset quickstart --run_name ladder --population.num_tasks "${DIVERSITIES// /,}" --trainer.compile true

## evaluate the quickstart
icl evaluate "$RUNS/quickstart" --num_prompts 4096

## evaluate the ladder
for m in $DIVERSITIES; do icl evaluate "$RUNS/ladder/num_tasks=$m" --num_prompts 2048 --num_ood_prompts 512; done

## moving pools: the runs
# M = 8 and 64 fixed tasks, and M = 8 tasks that walk slowly or fast, with eight seeds each.
LOCAL_ROOT=$RUNS/moving-pool icl sweep sweeps/training-runs/moving-pool.yaml --pack

## moving pools: the gaps
icl evaluate "$RUNS"/moving-pool/*max_steps=3000* --num_prompts 2048 --num_ood_prompts 16

## other worlds: the runs
LOCAL_ROOT=$RUNS/worlds icl sweep sweeps/training-runs/worlds.yaml --pack

## other worlds: the gaps
icl evaluate "$RUNS"/worlds/* --num_prompts 2048 --num_ood_prompts 16

## prior ladder: the runs
LOCAL_ROOT=$RUNS/prior-ladder icl sweep sweeps/training-runs/prior-ladder.yaml --pack

## prior ladder: mixtures
icl analyse "$RUNS/prior-ladder/prior-quickstart" --what mixture --jointly_with "$RUNS/prior-ladder/*"

## prior ladder: implicit priors
icl analyse "$RUNS/prior-ladder/prior-quickstart" --what prior
icl analyse "$RUNS/prior-ladder/prior-quickstart,num_tasks=16" --what prior

## ridge comes and goes: the runs
icl train --preset transience --run_name transience --population.seeds 0,1,2,3

## ridge comes and goes: the analysis
icl analyse "$RUNS/transience" --what behaviour --num_scales 0

## threshold in M: the runs
icl train --run_name threshold --task.task_size 4 --task.max_examples 8 --task.noise_variance 0.1 --model.embed_size 64 \
    --model.mlp_size 128 --optim.lr 0.003 --trainer.batch_size 128 --trainer.max_steps 4000 --evaluation.every 1000 \
    --checkpoints.num_log 10 --checkpoints.num_linear 4 --population.num_tasks 4,8,16,32,64,128 --population.seeds 0,1,2,3

## threshold in M: the gaps
icl evaluate "$RUNS/threshold" --num_ood_prompts 2048

## test the sampler on known answers
icl llc --self-test --out "$RUNS/known-answers.csv"

## LLCs of the quickstart
# The settings of the shipped table, which is older than the kernel baoab.
icl llc "$RUNS/quickstart" --sampler.kernel sgld --sampler.lr 2e-5 --sampler.num_samples 1048576 \
    --sampler.num_burnin_steps 150 --sampler.num_draws 100 --steps 0,56,216,531,832,1302,2039,3193,4444,5000

## calibrate the sampler of the quickstart
# A search for lr, nbeta, localization and burn-in. The LLCs above use the preset's values.
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

## essential dynamics of the ladder, together
finite=$(printf "$RUNS/ladder/num_tasks=%s," ${DIVERSITIES% inf})
icl analyse "$RUNS/ladder/num_tasks=inf" --what essential-dynamics --distribution first_task --jointly_with "${finite%,}"
