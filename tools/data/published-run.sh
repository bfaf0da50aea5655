#!/usr/bin/env bash
# The commands that make data/published-run: the run of Hoogland et al. 2024 (L2H4) with all of its 500,000 steps. It takes a day on two
# CPU cores. `make data SIZE=published-run` runs the commands one phase (##) after the other, records the times, and then makes the
# tables. If it is interrupted, the same command continues. To run them by hand: bash tools/data/published-run.sh
#
# The training is as published, but with two seeds instead of five. The LLC chains are fewer and shorter than published. The shipped runs
# were trained with the code of commit 118febb (version 0.1.0), in several sittings; docs/reproduction.md says how.
set -euo pipefail
export LOCAL_ROOT=${LOCAL_ROOT:-runs} RUNS=${LOCAL_ROOT:-runs}
# The steps of the LLCs: four in stage LR1, eight in LR2, four in LR3, five in LR4 and four in LR5.
STEPS=0,118,661,1465,2843,5517,9375,13954,20202,27072,35290,40292,60606,80808,101010,126262,161616,202020,242424,282828,318181,363636,409090,454545,500000
BAOAB="--sampler.kernel baoab --sampler.lr 5e-6 --sampler.friction 0.7 --sampler.num_samples 131072 --sampler.batch_size 512
    --sampler.num_chains 8 --sampler.num_burnin_steps 100 --sampler.num_draws 200"

## train L2H4, seeds 0 and 1
icl train --preset L2H4 --model.double_residual true --trainer.compile true --checkpoints.moments true --run_name L2H4 \
    --population.seeds 0,1

## evaluate L2H4, seed 0
icl evaluate "$RUNS/L2H4/seed=0" --num_prompts 8192 --num_ood_prompts 512

## LLCs of L2H4, seed 0, with the kernel baoab
# The preset has minibatches of 1,024 prompts and more draws: 8 chains of 120 + 400 moves. Runs of version 0.1.0 have other settings.
icl llc "$RUNS/L2H4/seed=0" --steps "$STEPS" $BAOAB

## LLCs of L2H4, seed 0, with a localization that follows the weights
# From the end of LR2 (step 40,292) to the end of the run, the norm of the weights grows by the factor 8.2. With a localization of 1000 / 8.2^2,
# the chains move as far in relation to the weights as they do at the end of LR2 with 1000. The weaker localization needs longer chains.
WEAKER="--sampler.kernel baoab --sampler.lr 1e-5 --sampler.friction 0.8 --sampler.num_samples 131072 --sampler.batch_size 512"
icl llc "$RUNS/L2H4/seed=0" --steps 500000 $WEAKER --sampler.num_chains 4 --sampler.localization 120 \
    --sampler.num_burnin_steps 300 --sampler.num_draws 600
icl llc "$RUNS/L2H4/seed=0" --steps 500000 $WEAKER --sampler.num_chains 4 --sampler.localization 14.8 \
    --sampler.num_burnin_steps 2000 --sampler.num_draws 2000

## LLCs of L2H4, seed 0, with the published sampler
# Published: 10 chains of 5,000 moves on 1,024 prompts. Exit status 1 means that all estimates are invalid, which is a result.
icl llc "$RUNS/L2H4/seed=0" --published --steps "$STEPS" --sampler.num_chains 2 --sampler.num_draws 1000 \
    --sampler.batch_size 32 || test $? -eq 1

## essential dynamics of L2H4, seed 0
icl analyse "$RUNS/L2H4/seed=0" --what essential-dynamics

## embeddings and attention of L2H4, seed 0
icl analyse "$RUNS/L2H4/seed=0" --what embeddings
icl analyse "$RUNS/L2H4/seed=0" --what attention

## Hessian of L2H4, seed 0, at twelve steps
for step in 0 1465 5517 9375 20202 40292 80808 126262 202020 318181 409090 500000; do
    icl analyse "$RUNS/L2H4/seed=0/checkpoints/step-$(printf %09d $step).safetensors" --what hessian --num_prompts 1024 \
        --out "$RUNS/L2H4/seed=0/results/hessian-$step.csv"
done

## behaviour and stages of L2H4, seed 0
icl analyse "$RUNS/L2H4/seed=0" --what behaviour
icl analyse "$RUNS/L2H4/seed=0" --what stages

## evaluate L2H4, seed 1
icl evaluate "$RUNS/L2H4/seed=1" --num_prompts 8192 --num_ood_prompts 512

## LLCs of L2H4, seed 1, with the kernel baoab
icl llc "$RUNS/L2H4/seed=1" --steps 1465,5517,9375,20202,40292,80808,126262,202020,318181,500000 $BAOAB

## LLCs of L2H4, seed 1, with a localization that follows the weights
# The weights grow by the factors 2.15, 7.0 and 7.9 from the end of LR2 to the ends of LR3, LR4 and LR5.
WEAKER="--sampler.kernel baoab --sampler.lr 1e-5 --sampler.friction 0.8 --sampler.num_samples 131072 --sampler.batch_size 512"
icl llc "$RUNS/L2H4/seed=1" --steps 126262 $WEAKER --sampler.num_chains 4 --sampler.localization 216 \
    --sampler.num_burnin_steps 400 --sampler.num_draws 600
icl llc "$RUNS/L2H4/seed=1" --steps 318181 $WEAKER --sampler.num_chains 4 --sampler.localization 20.3 \
    --sampler.num_burnin_steps 1500 --sampler.num_draws 1500
icl llc "$RUNS/L2H4/seed=1" --steps 500000 $WEAKER --sampler.num_chains 4 --sampler.localization 16 \
    --sampler.num_burnin_steps 2000 --sampler.num_draws 2000

## LLCs of L2H4, seed 1, with the published sampler
icl llc "$RUNS/L2H4/seed=1" --published --steps 1465,5517,9375,20202,40292,80808,126262,202020,318181,500000 \
    --sampler.num_chains 2 --sampler.num_draws 1000 --sampler.batch_size 32 || test $? -eq 1

## refined estimates of L2H4, seed 1: heads and layers
REFINED="--sampler.kernel baoab --sampler.lr 5e-6 --sampler.friction 0.7 --sampler.num_samples 32768 --sampler.batch_size 128
    --sampler.num_chains 4 --sampler.num_burnin_steps 40 --sampler.num_draws 120"
for components in heads layers; do
    icl llc "$RUNS/L2H4/seed=1" --components $components --steps 5517,9375,20202,40292,80808,126262,318181,500000 $REFINED
done

## Hessian of L2H4, seed 1, at eleven steps
for step in 0 1465 5517 9375 20202 40292 80808 126262 202020 318181 409090; do
    icl analyse "$RUNS/L2H4/seed=1/checkpoints/step-$(printf %09d $step).safetensors" --what hessian --num_prompts 1024 \
        --out "$RUNS/L2H4/seed=1/results/hessian-$step.csv"
done

## essential dynamics of L2H4, seed 1
icl analyse "$RUNS/L2H4/seed=1" --what essential-dynamics

## embeddings and attention of L2H4, seed 1
icl analyse "$RUNS/L2H4/seed=1" --what embeddings
icl analyse "$RUNS/L2H4/seed=1" --what attention

## behaviour and stages of L2H4, seed 1
icl analyse "$RUNS/L2H4/seed=1" --what behaviour
icl analyse "$RUNS/L2H4/seed=1" --what stages
