#!/usr/bin/env bash
# The rows of the tables in results/README.md, in order of priority:
#
#   bash results/reproduce.sh [--minutes N] [--only SCRIPT] [--data_dir DIR] [--device cuda] [--publish]
#                             [--list]
#
# A finished row is skipped, a broken-off one resumed; after N minutes the run at hand saves its
# checkpoint and the rest is listed as left. Runs live in runs/results/<variant>. --publish copies
# their result.json and pictures to results/ and rewrites the tables; rows of real data need DIR,
# rows `full`, the papers' configurations, a GPU as well (and have FIDs if DIR has the weights). The
# ablations of ebm_revision, five seeds, come last. --list prints the commands and runs none.
set -u
cd "$(dirname "$0")/.."
minutes=100000 only="" data_dir="" device=auto publish=0 list=0
usage() { echo "$1" >&2; sed -n '2,11p' "$0" >&2; exit 2; }
while [ $# -gt 0 ]; do
    case "$1" in
        --publish) publish=1; shift; continue ;;
        --list) list=1; shift; continue ;;
        --minutes | --only | --data_dir | --device) [ $# -gt 1 ] || usage "$1 needs a value" ;;
        *) usage "no such option: $1" ;;
    esac
    printf -v "${1#--}" %s "$2"
    shift 2
done
[[ "$minutes" =~ ^[0-9]+$ ]] || usage "--minutes $minutes: give a whole number"
[ -z "$only" ] || [ -e "$only.py" ] || usage "--only $only: there is no $only.py"
[ -z "$data_dir" ] || [ -d "$data_dir" ] || usage "--data_dir $data_dir: there is no such folder"

# script, data set, variant, seed, flags
listed() {
    cat <<'ROWS'
jnf mnist_svhn full 0 --amp --compile
latent_ebm_prior mnist_svhn full 0 --amp --compile
jnf polymnist full 0 --amp --compile
latent_ebm_prior polymnist full 0 --amp --compile
sbm_vae polymnist10 full 0 --preset paper --amp
joint_layer_ebm cifar10 full 0 --amp
ebm_revision polymnist full 0 --amp
jnf synth_mnist_svhn default 0
joint_layer_ebm synth_svhn default 0
sbm_vae synth_polymnist default 0
latent_ebm_prior synth_polymnist default 0
ebm_revision synth_mnist_svhn default 0
sbm_vae synth_mnist_svhn default 0
latent_ebm_prior synth_mnist_svhn default 0
jnf synth_mnist_svhn gaussian 0 --flow_blocks 0
jnf synth_polymnist three-modalities 0
jnf synth_polymnist three-modalities-gaussian 0 --flow_blocks 0
jnf shapes default 0
sbm_vae synth_polymnist obs-noise-fresh 0 --eval_only --checkpoint runs/results/default/sbm_vae/synth_polymnist/0/checkpoint.pt --obs_noise fresh --curve
sbm_vae synth_polymnist obs-noise-fixed 0 --eval_only --checkpoint runs/results/default/sbm_vae/synth_polymnist/0/checkpoint.pt --obs_noise fixed --curve
sbm_vae synth_polymnist obs-noise-official 0 --eval_only --checkpoint runs/results/default/sbm_vae/synth_polymnist/0/checkpoint.pt --obs_noise official --curve
sbm_vae synth_polymnist samplers 0 --eval_only --checkpoint runs/results/default/sbm_vae/synth_polymnist/0/checkpoint.pt --n_curve 2000
sbm_vae polymnist small 0 --ae_net patch --z_dim 32 --vae_beta 0.05 --lr_ae 2e-3 --batch_ae 32 --epochs_ae 6 --batch_size 128 --epochs_score 45 --width 192 --lr_score 1e-3 --n_eval 2000
sbm_vae polymnist10 2-modalities 0 --n_modalities 2 --n_train 30000 --ae_net patch --z_dim 32 --vae_beta 0.05 --lr_ae 2e-3 --batch_ae 32 --epochs_ae 6 --batch_size 128 --epochs_score 50 --width 192 --lr_score 1e-3 --n_eval 2000
sbm_vae polymnist10 4-modalities 0 --n_modalities 4 --n_train 30000 --ae_net patch --z_dim 32 --vae_beta 0.05 --lr_ae 2e-3 --batch_ae 32 --epochs_ae 6 --batch_size 128 --epochs_score 50 --width 192 --lr_score 1e-3 --n_eval 2000
sbm_vae polymnist10 8-modalities 0 --n_modalities 8 --n_train 30000 --ae_net patch --z_dim 32 --vae_beta 0.05 --lr_ae 2e-3 --batch_ae 32 --epochs_ae 6 --batch_size 128 --epochs_score 50 --width 192 --lr_score 1e-3 --n_eval 2000
sbm_vae polymnist10 10-modalities 0 --n_modalities 10 --n_train 30000 --ae_net patch --z_dim 32 --vae_beta 0.05 --lr_ae 2e-3 --batch_ae 32 --epochs_ae 6 --batch_size 128 --epochs_score 50 --width 192 --lr_score 1e-3 --n_eval 2000
sbm_vae polymnist10 4-modalities-official 0 --n_modalities 4 --n_train 30000 --ae_net patch --z_dim 32 --vae_beta 0.05 --lr_ae 2e-3 --batch_ae 32 --epochs_ae 6 --batch_size 128 --epochs_score 50 --width 192 --lr_score 1e-3 --n_eval 2000 --eval_only --checkpoint runs/results/4-modalities/sbm_vae/polymnist10/0/checkpoint.pt --obs_noise official --curve
sbm_vae polymnist10 4-modalities-fresh 0 --n_modalities 4 --n_train 30000 --ae_net patch --z_dim 32 --vae_beta 0.05 --lr_ae 2e-3 --batch_ae 32 --epochs_ae 6 --batch_size 128 --epochs_score 50 --width 192 --lr_score 1e-3 --n_eval 2000 --eval_only --checkpoint runs/results/4-modalities/sbm_vae/polymnist10/0/checkpoint.pt --obs_noise fresh --curve
sbm_vae polymnist10 4-modalities-unmasked 0 --n_modalities 4 --n_train 30000 --ae_net patch --z_dim 32 --vae_beta 0.05 --lr_ae 2e-3 --batch_ae 32 --epochs_ae 6 --batch_size 128 --epochs_score 50 --width 192 --lr_score 1e-3 --n_eval 2000 --cond_train none --obs_noise fresh --epochs_energy 20 --guide_sweep 0 1 3 10 30 --curve
sbm_vae polymnist10 4-modalities-unmasked-official 0 --n_modalities 4 --n_train 30000 --ae_net patch --z_dim 32 --vae_beta 0.05 --lr_ae 2e-3 --batch_ae 32 --epochs_ae 6 --batch_size 128 --epochs_score 50 --width 192 --lr_score 1e-3 --n_eval 2000 --cond_train none --epochs_energy 20 --eval_only --checkpoint runs/results/4-modalities-unmasked/sbm_vae/polymnist10/0/checkpoint.pt --obs_noise official --curve
sbm_vae polymnist10 4-modalities-unmasked-guided 0 --n_modalities 4 --n_train 30000 --ae_net patch --z_dim 32 --vae_beta 0.05 --lr_ae 2e-3 --batch_ae 32 --epochs_ae 6 --batch_size 128 --epochs_score 50 --width 192 --lr_score 1e-3 --n_eval 2000 --cond_train none --epochs_energy 20 --eval_only --checkpoint runs/results/4-modalities-unmasked/sbm_vae/polymnist10/0/checkpoint.pt --obs_noise fresh --guide_weight 10 --curve
sbm_vae polymnist10 4-modalities-masked-guided 0 --n_modalities 4 --n_train 30000 --ae_net patch --z_dim 32 --vae_beta 0.05 --lr_ae 2e-3 --batch_ae 32 --epochs_ae 6 --batch_size 128 --epochs_score 50 --width 192 --lr_score 1e-3 --n_eval 2000 --epochs_energy 20 --guide_weight 10 --guide_sweep 0 1 3 10 30 --curve
sbm_vae polymnist10 4-modalities-paper 0 --n_modalities 4 --preset paper --score_net mlp --schedule cosine --n_train 30000 --ae_net patch --z_dim 32 --vae_beta 0.05 --lr_ae 2e-3 --batch_ae 32 --epochs_ae 6 --batch_size 128 --epochs_score 50 --width 192 --lr_score 1e-3 --n_eval 2000 --curve
sbm_vae celebamask_hq small 0 --ae_net patch --z_dim 64 --batch_ae 25 --lr_ae 1e-3 --epochs_ae 300 --batch_size 128 --lr_score 1e-3 --epochs_score 3000 --width 192
sbm_vae synth_polymnist three-modalities 0 --n_modalities 3
ebm_revision synth_polymnist three-modalities 0
ebm_revision synth_polymnist three-modalities-clamped 0 --product clamped
sbm_vae mnist_svhn default 0
latent_ebm_prior synth_polymnist whiten 0 --whiten --smooth 0.2 --prior_step_size 0.2
latent_ebm_prior synth_polymnist whiten 1 --whiten --smooth 0.2 --prior_step_size 0.2
latent_ebm_prior synth_polymnist whiten 2 --whiten --smooth 0.2 --prior_step_size 0.2
latent_ebm_prior synth_mnist_svhn whiten 0 --whiten --smooth 0.2 --prior_step_size 0.2
latent_ebm_prior synth_mnist_svhn whiten 1 --whiten --smooth 0.2 --prior_step_size 0.2
latent_ebm_prior synth_mnist_svhn whiten 2 --whiten --smooth 0.2 --prior_step_size 0.2
latent_ebm_prior synth_polymnist no-sigmoid 0 --z_dim 10 --epochs_ebm 2 --ebm_act gelu --max_gap 50
latent_ebm_prior synth_polymnist sigmoid 0 --sigmoid --z_dim 10 --epochs_ebm 2 --ebm_act gelu --max_gap 50
latent_ebm_prior polymnist10 three-modalities 0 --n_modalities 3 --n_train 30000 --net mlp --z_dim 16 --w_dim 16 --decoder_scale 0.4 --batch_size 64 --decay --lr 1e-3 --beta 1 --objective dreg --k 3 --epochs_vae 15 --ebm_warmup 15 --epochs_ebm 3 --lr_ebm 1e-3 --n_eval 5000
jnf polymnist 3000-steps 0 --net conv --z_dim 32 --max_steps 3000 --lr 2e-3 --lr_warmup 500 --n_eval 1000
jnf polymnist 8000-steps 0 --net mlp --z_dim 64 --decoder_dist normal --decoder_scale 0.3 --batch_size 32 --max_steps 8000 --lr 1e-3 --lr_warmup 200 --n_eval 1000
jnf polymnist gaussian-8000-steps 0 --net mlp --z_dim 64 --decoder_dist normal --decoder_scale 0.3 --batch_size 32 --max_steps 8000 --lr 1e-3 --lr_warmup 200 --n_eval 1000 --flow_blocks 0
jnf polymnist contrastive-8000-steps 0 --net mlp --z_dim 64 --decoder_dist normal --decoder_scale 0.3 --batch_size 32 --max_steps 8000 --lr 1e-3 --lr_warmup 200 --n_eval 1000 --shared contrastive
jnf polymnist 8000-steps-official-exponent 0 --net mlp --z_dim 64 --decoder_dist normal --decoder_scale 0.3 --batch_size 32 --max_steps 8000 --lr 1e-3 --lr_warmup 200 --n_eval 500 --eval_only --checkpoint runs/results/8000-steps/jnf/polymnist/0/checkpoint.pt --prior_exponent official
jnf polymnist gmm 0 --net mlp --z_dim 64 --decoder_dist normal --decoder_scale 0.3 --batch_size 32 --max_steps 8000 --lr 1e-3 --lr_warmup 200 --n_eval 1000 --eval_only --checkpoint runs/results/8000-steps/jnf/polymnist/0/checkpoint.pt --latent_prior gmm
ebm_revision polymnist small 0 --product clamped --net mlp --z_dim 16 --width 8 --sigma 2 --batch_size 64 --warmup 3 --epochs 4 --z_init random --x_steps 10 --x_steps_test 10 --x_step_size 1.4 --z_steps 20 --lr_ebm 5e-4 --lr_gen 1e-3 --lr_enc 1e-3 --gamma 0.8 --weight_decay 0 --n_eval 1000
latent_ebm_prior polymnist cross-warmup 0 --net patch --width 32 --z_dim 16 --w_dim 32 --decoder_dist normal --decoder_scale 0.15 --beta 1 --batch_size 64 --lr 2e-3 --decay --cross_warmup 2 --epochs_vae 12 --ebm_warmup 12 --epochs_ebm 2 --lr_ebm 1e-3 --n_eval 5000
latent_ebm_prior polymnist cross-warmup-wide 0 --net patch --width 32 --z_dim 16 --w_dim 16 --decoder_dist normal --decoder_scale 0.3 --beta 1 --batch_size 64 --lr 2e-3 --decay --cross_warmup 2 --epochs_vae 10 --ebm_warmup 10 --epochs_ebm 2 --lr_ebm 1e-3 --n_eval 5000
latent_ebm_prior polymnist cross-warmup-long-f 0 --net patch --width 32 --z_dim 16 --w_dim 16 --decoder_dist normal --decoder_scale 0.3 --beta 1 --batch_size 64 --lr 2e-3 --decay --cross_warmup 2 --epochs_vae 10 --ebm_warmup 10 --epochs_ebm 6 --lr_ebm 1e-3 --ebm_act lrelu --max_gap 15 --n_eval 5000
latent_ebm_prior polymnist cross-warmup-long-f-aux 0 --net patch --width 32 --z_dim 16 --w_dim 16 --decoder_dist normal --decoder_scale 0.3 --beta 1 --batch_size 64 --lr 2e-3 --decay --cross_warmup 2 --epochs_vae 10 --ebm_warmup 10 --epochs_ebm 6 --lr_ebm 1e-3 --ebm_act lrelu --max_gap 15 --n_eval 5000 --w_test aux --eval_only --checkpoint runs/results/cross-warmup-long-f/latent_ebm_prior/polymnist/0/checkpoint.pt
latent_ebm_prior polymnist cross-warmup-mcmc 0 --net patch --width 32 --z_dim 16 --w_dim 16 --decoder_dist normal --decoder_scale 0.3 --beta 1 --batch_size 64 --lr 2e-3 --decay --cross_warmup 2 --epochs_vae 10 --ebm_warmup 10 --epochs_ebm 2 --lr_ebm 1e-3 --n_eval 5000 --inference mcmc --post_steps 5
latent_ebm_prior polymnist cross-warmup-mcmc-aux 0 --net patch --width 32 --z_dim 16 --w_dim 16 --decoder_dist normal --decoder_scale 0.3 --beta 1 --batch_size 64 --lr 2e-3 --decay --cross_warmup 2 --epochs_vae 10 --ebm_warmup 10 --epochs_ebm 2 --lr_ebm 1e-3 --n_eval 5000 --inference mcmc --post_steps 5 --w_test aux --eval_only --checkpoint runs/results/cross-warmup-mcmc/latent_ebm_prior/polymnist/0/checkpoint.pt
latent_ebm_prior mnist_svhn shared-small 0 --net patch --width 32 --batch_size 64 --decay --lr 3e-3 --objective elbo --k 1 --epochs_vae 8 --ebm_warmup 8 --epochs_ebm 2 --lr_ebm 1e-3
latent_ebm_prior mnist_svhn shared-k3 0 --width 32 --amp --batch_size 64 --decay --lr 1.5e-3 --objective dreg --k 3 --epochs_vae 12 --ebm_warmup 12 --epochs_ebm 3 --lr_ebm 1e-3
latent_ebm_prior mnist_svhn shared-k3-8-epochs 0 --width 32 --amp --batch_size 64 --decay --lr 1.5e-3 --objective dreg --k 3 --epochs_vae 8 --ebm_warmup 8 --epochs_ebm 2 --lr_ebm 1e-3
latent_ebm_prior mnist_svhn long-f 0 --width 32 --amp --batch_size 64 --decay --lr 1.5e-3 --objective dreg --k 3 --epochs_vae 8 --ebm_warmup 8 --epochs_ebm 6 --lr_ebm 1e-3 --ebm_act lrelu --max_gap 15
latent_ebm_prior mnist_svhn long-f 1 --width 32 --amp --batch_size 64 --decay --lr 1.5e-3 --objective dreg --k 3 --epochs_vae 8 --ebm_warmup 8 --epochs_ebm 6 --lr_ebm 1e-3 --ebm_act lrelu --max_gap 15
latent_ebm_prior mnist_svhn long-f 2 --width 32 --amp --batch_size 64 --decay --lr 1.5e-3 --objective dreg --k 3 --epochs_vae 8 --ebm_warmup 8 --epochs_ebm 6 --lr_ebm 1e-3 --ebm_act lrelu --max_gap 15
latent_ebm_prior mnist_svhn long-f-whiten 0 --width 32 --batch_size 64 --decay --lr 1.5e-3 --objective dreg --k 3 --epochs_vae 8 --ebm_warmup 8 --epochs_ebm 6 --lr_ebm 1e-3 --ebm_act lrelu --max_gap 15 --whiten --smooth 0.2 --prior_step_size 0.2
latent_ebm_prior mnist_svhn shared-k3-mcmc 0 --width 32 --amp --batch_size 64 --decay --lr 1.5e-3 --objective dreg --k 3 --epochs_vae 8 --ebm_warmup 8 --epochs_ebm 2 --lr_ebm 1e-3 --inference mcmc --post_steps 5
latent_ebm_prior mnist_svhn shared-k3-sigmoid 0 --width 32 --amp --batch_size 64 --decay --lr 1.5e-3 --objective dreg --k 3 --epochs_vae 8 --ebm_warmup 8 --epochs_ebm 2 --lr_ebm 1e-3 --sigmoid
ebm_revision mnist_svhn small 0 --product clamped --z_init product --net mlp --z_dim 16 --width 8 --sigma 2 --batch_size 64 --warmup 8 --epochs 12 --x_steps 10 --x_step_size 1.4 --z_steps 5 --lr_ebm 5e-4 --mixed 1 --lr_mixed 1e-3 --x_steps_test 60 --lr_gen 1e-3 --lr_enc 1e-3 --gamma 0.8 --weight_decay 0 --n_eval 5000
ebm_revision mnist_svhn small-10-steps 0 --product clamped --z_init product --net mlp --z_dim 16 --width 8 --sigma 2 --batch_size 64 --warmup 8 --epochs 12 --x_steps 10 --x_step_size 1.4 --z_steps 5 --lr_ebm 5e-4 --mixed 1 --lr_mixed 1e-3 --x_steps_test 10 --lr_gen 1e-3 --lr_enc 1e-3 --gamma 0.8 --weight_decay 0 --n_eval 5000 --eval_only --checkpoint runs/results/small/ebm_revision/mnist_svhn/0/checkpoint.pt
ebm_revision synth_mnist_svhn mixture-start 0 --z_init random --mixed 0 --epochs 20 --x_steps_test 30
ebm_revision synth_mnist_svhn mixture-start 1 --z_init random --mixed 0 --epochs 20 --x_steps_test 30
ebm_revision synth_mnist_svhn mixture-start-20-steps 0 --z_init random --z_steps 20 --z_step_size 0.2 --z_noise 0.2 --mixed 0 --epochs 20 --x_steps_test 30
ebm_revision synth_mnist_svhn plain 0 --mixed 0 --epochs 20 --x_steps_test 30
latent_ebm_prior synth_mnist_svhn mcmc 0 --inference mcmc --post_steps 5 --epochs_ebm 2 --ebm_act gelu --max_gap 50
latent_ebm_prior synth_mnist_svhn mcmc-small-step 0 --inference mcmc --post_steps 5 --post_step_size 0.01
latent_ebm_prior synth_mnist_svhn mcmc-small-step-aux 0 --inference mcmc --post_steps 5 --post_step_size 0.01 --w_test aux --eval_only --checkpoint runs/results/mcmc-small-step/latent_ebm_prior/synth_mnist_svhn/0/checkpoint.pt
latent_ebm_prior synth_mnist_svhn mcmc-u 0 --inference mcmc --post_steps 5 --ebm_on u
latent_ebm_prior synth_mnist_svhn mcmc-u-aux 0 --inference mcmc --post_steps 5 --ebm_on u --w_test aux --eval_only --checkpoint runs/results/mcmc-u/latent_ebm_prior/synth_mnist_svhn/0/checkpoint.pt
latent_ebm_prior synth_mnist_svhn aux 0 --w_test aux --eval_only --checkpoint runs/results/default/latent_ebm_prior/synth_mnist_svhn/0/checkpoint.pt
latent_ebm_prior synth_mnist_svhn short-f 0 --epochs_ebm 2 --ebm_act gelu --max_gap 50
sbm_vae synth_polymnist unmasked 0 --cond_train none --obs_noise fresh --epochs_energy 10 --guide_sweep 0 0.3 1 3 10 --curve
sbm_vae synth_polymnist unmasked-fixed 0 --cond_train none --epochs_energy 10 --eval_only --checkpoint runs/results/unmasked/sbm_vae/synth_polymnist/0/checkpoint.pt --obs_noise fixed --curve
sbm_vae synth_polymnist unmasked-official 0 --cond_train none --epochs_energy 10 --eval_only --checkpoint runs/results/unmasked/sbm_vae/synth_polymnist/0/checkpoint.pt --obs_noise official --curve
sbm_vae synth_polymnist unmasked-guided 0 --cond_train none --epochs_energy 10 --eval_only --checkpoint runs/results/unmasked/sbm_vae/synth_polymnist/0/checkpoint.pt --obs_noise fresh --guide_weight 10 --guide_sweep 30 100 --curve
sbm_vae synth_polymnist masked-guided 0 --epochs_energy 10 --guide_weight 10 --guide_sweep 0 1 3 10 30 --curve
jnf mnist_svhn 3000-steps 0 --max_steps 3000
jnf mnist_svhn contrastive-3000-steps 0 --max_steps 3000 --shared contrastive
jnf mnist_svhn 3000-steps-warmup 0 --max_steps 3000 --lr 2e-3 --lr_warmup 500
jnf mnist_svhn gaussian-3000-steps-warmup 0 --max_steps 3000 --lr 2e-3 --lr_warmup 500 --flow_blocks 0
jnf mnist_svhn gmm 0 --max_steps 3000 --lr 2e-3 --lr_warmup 500 --eval_only --checkpoint runs/results/3000-steps-warmup/jnf/mnist_svhn/0/checkpoint.pt --latent_prior gmm
jnf mnist_svhn 3000-steps-lr-2e-3 0 --max_steps 3000 --lr 2e-3
jnf mnist_svhn gaussian-3000-steps-lr-2e-3 0 --max_steps 3000 --lr 2e-3 --flow_blocks 0
jnf mnist_svhn long 0 --epochs_joint 6 --epochs_flow 4
joint_layer_ebm mnist held-out-1 0 --held_out 1 --n_eval 5000
joint_layer_ebm mnist held-out-4 0 --held_out 4 --n_eval 2000 --long_steps 500
joint_layer_ebm mnist held-out-5 0 --held_out 5 --n_eval 2000 --long_steps 500
joint_layer_ebm mnist held-out-7 0 --held_out 7 --n_eval 2000 --long_steps 500
joint_layer_ebm mnist held-out-9 0 --held_out 9 --n_eval 5000 --f_hidden 200
joint_layer_ebm mnist held-out-9-single-layer 0 --held_out 9 --z_dims 8 --f_hidden 200 --epochs_backbone 20 --epochs 6 --last_epochs 6 --n_eval 2000 --long_steps 500
joint_layer_ebm mnist held-out-1-single-layer 0 --held_out 1 --z_dims 8 --f_hidden 200 --epochs_backbone 20 --epochs 6 --last_epochs 6 --n_eval 2000 --long_steps 500
joint_layer_ebm mnist held-out-4-single-layer 0 --held_out 4 --z_dims 8 --f_hidden 200 --epochs_backbone 20 --epochs 6 --last_epochs 6 --n_eval 2000 --long_steps 500
joint_layer_ebm mnist held-out-5-single-layer 0 --held_out 5 --z_dims 8 --f_hidden 200 --epochs_backbone 20 --epochs 6 --last_epochs 6 --n_eval 2000 --long_steps 500
joint_layer_ebm mnist held-out-7-single-layer 0 --held_out 7 --z_dims 8 --f_hidden 200 --epochs_backbone 20 --epochs 6 --last_epochs 6 --n_eval 2000 --long_steps 500
joint_layer_ebm mnist variational 0 --n_eval 5000
joint_layer_ebm svhn variational 0 --scheme variational --net ladder --z_dims 16 32 32 --width 24 --prior_layers 2 --f_hidden 200 --f_layers 2 --prior_steps 40 --lr 1e-3 --lr_ebm 3e-4 --epochs_backbone 25 --epochs 10 --decay --n_eval 2000
joint_layer_ebm mnist two-stage 0 --scheme two_stage --max_gap 1e5 --no-decay --width 16 --group_dim 2 --n_train 40000 --epochs_backbone 2 --epochs 1 --prior_steps 10 --lr_ebm 5e-4 --n_eval 1000 --long_steps 500
joint_layer_ebm cifar10 ood-svhn 0 --scheme two_stage --net ladder --z_dims 64 32 32 --width 16 --batch_size 100 --prior_hidden 64 --prior_layers 2 --f_hidden 100 --prior_steps 10 --prior_step_size 0.02 --lr_ebm 1e-3 --max_gap 1e5 --kl_warmup 0 --free_bits 0 --epochs_backbone 6 --epochs 3 --ood svhn --n_eval 2000 --long_steps 500
joint_layer_ebm mnist ood-synth-mnist 0 --held_out 4 --n_eval 2000 --long_steps 500 --eval_only --checkpoint runs/results/held-out-4/joint_layer_ebm/mnist/0/checkpoint.pt --ood synth_mnist
jnf mnist_svhn 3000-steps-warmup 1 --max_steps 3000 --lr 2e-3 --lr_warmup 500
jnf mnist_svhn 3000-steps-warmup 2 --max_steps 3000 --lr 2e-3 --lr_warmup 500
jnf mnist_svhn 3000-steps 1 --max_steps 3000
jnf mnist_svhn warm-start-3000-steps 0 --max_steps 3000 --lr 2e-3 --lr_warmup 500 --warm_start
jnf mnist_svhn warm-start-3000-steps 1 --max_steps 3000 --lr 2e-3 --lr_warmup 500 --warm_start
jnf mnist_svhn warm-start-3000-steps 2 --max_steps 3000 --lr 2e-3 --lr_warmup 500 --warm_start
jnf mnist_svhn dcca-3000-steps 0 --max_steps 3000 --shared dcca
latent_ebm_prior mnist_svhn shared-k3-8-epochs 1 --width 32 --amp --batch_size 64 --decay --lr 1.5e-3 --objective dreg --k 3 --epochs_vae 8 --ebm_warmup 8 --epochs_ebm 2 --lr_ebm 1e-3
latent_ebm_prior mnist_svhn shared-k3-8-epochs 2 --width 32 --amp --batch_size 64 --decay --lr 1.5e-3 --objective dreg --k 3 --epochs_vae 8 --ebm_warmup 8 --epochs_ebm 2 --lr_ebm 1e-3
jnf synth_mnist_svhn default 1
sbm_vae synth_mnist_svhn default 1
sbm_vae synth_polymnist default 1
latent_ebm_prior synth_mnist_svhn default 1
ebm_revision synth_mnist_svhn plain 1 --mixed 0 --epochs 20 --x_steps_test 30
ebm_revision synth_mnist_svhn default 1
jnf synth_mnist_svhn default 2
jnf synth_mnist_svhn gaussian 1 --flow_blocks 0
jnf synth_mnist_svhn gaussian 2 --flow_blocks 0
jnf synth_mnist_svhn gmm 0 --eval_only --checkpoint runs/results/default/jnf/synth_mnist_svhn/0/checkpoint.pt --latent_prior gmm
jnf synth_mnist_svhn gmm 1 --eval_only --checkpoint runs/results/default/jnf/synth_mnist_svhn/1/checkpoint.pt --latent_prior gmm
jnf synth_mnist_svhn gmm 2 --eval_only --checkpoint runs/results/default/jnf/synth_mnist_svhn/2/checkpoint.pt --latent_prior gmm
sbm_vae synth_mnist_svhn default 2
sbm_vae synth_polymnist default 2
latent_ebm_prior synth_mnist_svhn default 2
ebm_revision synth_mnist_svhn plain 2 --mixed 0 --epochs 20 --x_steps_test 30
joint_layer_ebm synth_svhn default 1
joint_layer_ebm synth_svhn default 2
ebm_revision synth_mnist_svhn plain 3 --mixed 0 --epochs 20 --x_steps_test 30
ebm_revision synth_mnist_svhn plain 4 --mixed 0 --epochs 20 --x_steps_test 30
sbm_vae synth_polymnist three-modalities 1 --n_modalities 3
sbm_vae synth_polymnist three-modalities 2 --n_modalities 3
ebm_revision synth_polymnist three-modalities 1
ebm_revision synth_polymnist three-modalities 2
ebm_revision mnist_svhn small 1 --product clamped --z_init product --net mlp --z_dim 16 --width 8 --sigma 2 --batch_size 64 --warmup 8 --epochs 12 --x_steps 10 --x_step_size 1.4 --z_steps 5 --lr_ebm 5e-4 --mixed 1 --lr_mixed 1e-3 --x_steps_test 60 --lr_gen 1e-3 --lr_enc 1e-3 --gamma 0.8 --weight_decay 0 --n_eval 5000
ebm_revision mnist_svhn small-10-steps 1 --product clamped --z_init product --net mlp --z_dim 16 --width 8 --sigma 2 --batch_size 64 --warmup 8 --epochs 12 --x_steps 10 --x_step_size 1.4 --z_steps 5 --lr_ebm 5e-4 --mixed 1 --lr_mixed 1e-3 --x_steps_test 10 --lr_gen 1e-3 --lr_enc 1e-3 --gamma 0.8 --weight_decay 0 --n_eval 5000 --eval_only --checkpoint runs/results/small/ebm_revision/mnist_svhn/1/checkpoint.pt
ebm_revision mnist_svhn small 2 --product clamped --z_init product --net mlp --z_dim 16 --width 8 --sigma 2 --batch_size 64 --warmup 8 --epochs 12 --x_steps 10 --x_step_size 1.4 --z_steps 5 --lr_ebm 5e-4 --mixed 1 --lr_mixed 1e-3 --x_steps_test 60 --lr_gen 1e-3 --lr_enc 1e-3 --gamma 0.8 --weight_decay 0 --n_eval 5000
ebm_revision mnist_svhn small-10-steps 2 --product clamped --z_init product --net mlp --z_dim 16 --width 8 --sigma 2 --batch_size 64 --warmup 8 --epochs 12 --x_steps 10 --x_step_size 1.4 --z_steps 5 --lr_ebm 5e-4 --mixed 1 --lr_mixed 1e-3 --x_steps_test 10 --lr_gen 1e-3 --lr_enc 1e-3 --gamma 0.8 --weight_decay 0 --n_eval 5000 --eval_only --checkpoint runs/results/small/ebm_revision/mnist_svhn/2/checkpoint.pt
ebm_revision mnist_svhn small-mixture-start 1 --product clamped --z_init random --net mlp --z_dim 16 --width 8 --sigma 2 --batch_size 64 --warmup 8 --epochs 12 --x_steps 10 --x_step_size 1.4 --z_steps 5 --lr_ebm 5e-4 --mixed 1 --lr_mixed 1e-3 --x_steps_test 60 --lr_gen 1e-3 --lr_enc 1e-3 --gamma 0.8 --weight_decay 0 --n_eval 5000
ebm_revision mnist_svhn small-mixture-start 2 --product clamped --z_init random --net mlp --z_dim 16 --width 8 --sigma 2 --batch_size 64 --warmup 8 --epochs 12 --x_steps 10 --x_step_size 1.4 --z_steps 5 --lr_ebm 5e-4 --mixed 1 --lr_mixed 1e-3 --x_steps_test 60 --lr_gen 1e-3 --lr_enc 1e-3 --gamma 0.8 --weight_decay 0 --n_eval 5000
jnf synth_polymnist three-modalities 1
jnf synth_polymnist three-modalities 2
sbm_vae mnist_svhn default 1
sbm_vae mnist_svhn default 2
ROWS
}
rows() {
    listed
    again="jnf synth_polymnist three-modalities-gaussian|jnf mnist_svhn gaussian-3000-steps-warmup"
    small="latent_ebm_prior polymnist cross-warmup-wide|ebm_revision polymnist small"
    small+="|sbm_vae polymnist small|jnf polymnist (gaussian-)?8000-steps(-official-exponent)?"
    small+="|jnf (mnist_svhn|polymnist) gmm|joint_layer_ebm (mnist|svhn) variational"
    for variants in "$again" "$small"; do                  # with the flags of their first seed
        for seed in 1 2; do
            listed | sed -E -e "/^($variants) 0 /!d" -e "s//\\1 $seed /" -e "s#/0/check#/$seed/check#"
        done
    done
    for seed in {2..19}; do echo "ebm_revision synth_mnist_svhn default $seed"; done
    for seed in {3..19}; do echo "joint_layer_ebm synth_svhn default $seed"; done
    for seed in {1..19}; do echo "latent_ebm_prior synth_polymnist default $seed"; done
    w="--whiten --smooth 0.2 --prior_step_size 0.2"
    m="--inference mcmc --post_steps 5 --post_step_size 0.01"
    aux="--w_test aux --eval_only --checkpoint runs/results"
    for seed in 1 2; do
        echo "latent_ebm_prior synth_mnist_svhn aux $seed $aux/default/latent_ebm_prior/synth_mnist_svhn/$seed/checkpoint.pt"
        echo "latent_ebm_prior synth_mnist_svhn mcmc-small-step $seed $m"
        echo "latent_ebm_prior synth_mnist_svhn mcmc-small-step-aux $seed $m $aux/mcmc-small-step/latent_ebm_prior/synth_mnist_svhn/$seed/checkpoint.pt"
        echo "latent_ebm_prior mnist_svhn shared-k3-mcmc $seed --width 32 --batch_size 64 --decay --lr 1.5e-3 --objective dreg --k 3 --epochs_vae 8 --ebm_warmup 8 --epochs_ebm 2 --lr_ebm 1e-3 --inference mcmc --post_steps 5"
    done
    for seed in 0 1 2; do
        echo "latent_ebm_prior synth_mnist_svhn whiten-aux $seed $w $aux/whiten/latent_ebm_prior/synth_mnist_svhn/$seed/checkpoint.pt"
        echo "latent_ebm_prior synth_mnist_svhn mcmc-whiten $seed $m $w"
        echo "latent_ebm_prior synth_mnist_svhn mcmc-whiten-aux $seed $m $w $aux/mcmc-whiten/latent_ebm_prior/synth_mnist_svhn/$seed/checkpoint.pt"
    done
    for seed in {0..19}; do
        echo "latent_ebm_prior synth_polymnist aux $seed $aux/default/latent_ebm_prior/synth_polymnist/$seed/checkpoint.pt"
    done
    for seed in {1..10}; do
        echo "latent_ebm_prior synth_polymnist sigmoid $seed --sigmoid --z_dim 10 --epochs_ebm 2 --ebm_act gelu --max_gap 50"
    done
}

end=$(($(date +%s) + minutes * 60))
left=0
while read -r script dataset variant seed flags; do
    [ -n "$only" ] && [ "$only" != "$script" ] && continue
    name="$script $dataset $variant $seed"
    out="runs/results/$variant" folder="runs/results/$variant/$script/$dataset/$seed"
    # shellcheck disable=SC2206
    command=(python "$script.py" --dataset "$dataset" --seed "$seed" --out_dir "$out"
             --judges runs/judges --device "$device" --data_dir "${data_dir:-datasets}" $flags)
    if [[ "$variant" == full && -e "$data_dir/pt_inception-2015-12-05-6726825d.pth" ]]; then
        command+=(--fid)
    fi
    if [ "$list" = 1 ]; then
        echo "${command[*]}"; continue
    elif [ -e "$folder/result.json" ]; then
        echo "done: $name"
    elif [[ "$dataset" != synth_* && "$dataset" != shapes && -z "$data_dir" ]]; then
        echo "left: $name (needs --data_dir)"; left=$((left + 1)); continue
    elif [[ "$variant" == full && "$device" != cuda* ]]; then
        echo "left: $name (needs --device cuda)"; left=$((left + 1)); continue
    elif [ "$(date +%s)" -ge "$end" ]; then
        echo "left: $name"; left=$((left + 1)); continue
    else
        if [[ "$flags" != *--eval_only* ]]; then           # which leaves no checkpoint
            if [ -e "$folder/checkpoint.pt" ]; then
                command+=(--resume)
            elif [ -e "$folder/config.json" ]; then
                command+=(--overwrite)
            fi
        fi
        echo "run:  $name"
        timeout --foreground --kill-after=60 "$((end - $(date +%s)))" "${command[@]}" < /dev/null
        code=$?
        if [ ! -e "$folder/result.json" ]; then
            echo "left: $name (exit code $code)"; left=$((left + 1)); continue
        fi
    fi
    if [ "$publish" = 1 ]; then
        to="results/$script/$dataset/$variant/$seed"
        mkdir -p "$to" && cp "$folder"/result.json "$folder"/*.png "$to"
    fi
done < <(rows)
[ "$list" = 1 ] && exit

ablation() {                               # folder, seed, flags; every variant: hours on a CPU
    local name="ebm_revision's $1 $2" table="runs/$1/ablation/synth_mnist_svhn/$2.json"
    if [ -e "$table" ]; then
        echo "done: $name"
    elif [ "$(date +%s)" -lt "$end" ]; then
        echo "run:  $name"
        timeout --foreground --kill-after=60 "$((end - $(date +%s)))" python results/ablation.py \
            --out_dir "runs/$1" --seed "$2" --mixed 0 --epochs 20 --x_steps_test 30 \
            --device "$device" "${@:3}" < /dev/null
    fi
    if [ ! -e "$table" ]; then
        echo "left: $name"; left=$((left + 1))
    elif [ "$publish" = 1 ]; then
        mkdir -p "results/ebm_revision/$1" && cp "$table" "results/ebm_revision/$1"
    fi
}
if [ -z "$only" ] || [ "$only" = ebm_revision ]; then
    for seed in 0 1 2 3 4; do ablation ablation $seed; done
    for seed in 0 1 2 3 4; do
        ablation ablation-faded $seed --product faded \
            --variants full "x from noise" "no syn KL" "k_x 0"
    done
fi
[ "$publish" = 1 ] && python results/tables.py
echo "$left rows left"
