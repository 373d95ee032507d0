"""Tests of PEFT that look at LoRA's own tensors, so that no other method could pass them, with the reason for each."""

import re

# (pattern of the test's name, methods, reason).
NOT_APPLICABLE: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        r"TestDynamicDispatch::test_training_works",
        ("eigenlora", "moslora"),
        "looks for LoRA's own tensor lora_B.weight by name",
    ),
    (
        r"TestHotSwapping::test_prepare_model_for_compiled_hotswap_does_not_change_output_conv2d",
        ("moslora",),
        "asks for 1e-8, less than float32 rounds when B M is taken at the padded size; tests/tuners/host/test_rank_padding.py "
        "has it",
    ),
    (
        r"TestHotSwapping::.*(rank_padding|with_rank_pattern|rank_not_divisible)|TestMultiRankAdapter::test_multirank|"
        r"test_rank_pattern_for_moe_target_parameters",
        ("eigenlora-full", "eigenlora-diagonal"),
        "asserts the rank of the factors, or that one rank does not fit another; these cores have none",
    ),
    (
        r"TestHotSwapping::test_hotswap_missing_key_works|test_from_pretrained_missing_keys_warning",
        ("eigenlora",),
        "deletes LoRA's tensors from a state dict by name",
    ),
    (
        r"TestRequiresGrad::test_loading_adapter_preserves_custom_requires_grad",
        ("eigenlora-low_rank",),
        "freezes LoRA's weight, which ours computes from the coefficients; those are what can be frozen",
    ),
    (
        r"test_save_pretrained_warns_for_unsharded_state_dict",
        ("eigenlora",),
        "writes into LoRA's weight in place; tests/tuners/host/test_rank_padding.py has the warning of sharded coefficients",
    ),
    (
        r"test_lorafa_respects_layer_specific_scaling_patterns",
        ("eigenlora-low_rank",),
        "gives LoRA's weight a gradient by hand; tests/tuners/host/test_mixed_models.py has the step with its scaling",
    ),
    (
        r"TestDynamicDispatch::test_target_layer_without_in_features_out_features",
        ("eigenlora",),
        "its layer has none of LoRA's factors to replace (MoSLoRA refuses it), and an LSTM has no subspace",
    ),
    (
        r"TestHotSwapping::test_hotswap_different_peft_types_raises",
        ("eigenlora", "moslora"),
        "its message names LORA",
    ),
    (
        r"test_weighted_combination_of_adapters\[",
        ("eigenlora-full", "eigenlora-diagonal"),
        "asserts the rank r of the result, which these cores do not have",
    ),
    (
        r"TestWeightTying::.*target_modules",
        ("eigenlora", "moslora"),
        "compares addresses of LoRA's bare tensors; tests/tuners/eigenlora/test_combining.py checks that ours are shared",
    ),
    (
        r"test_only_params_are_updated\[Embedding \+ transformers Conv1D [23] LoRA",
        ("eigenlora",),
        "its learning rate suits LoRA's embedding, whose gradients do not spread over orthonormal components; "
        "tests/tuners/layers/test_kinds.py checks that every coefficient learns",
    ),
    (
        r"test_only_params_are_updated\[Embedding \+ transformers Conv1D 2 LoRA",
        ("moslora",),
        "its three steps move LoRA's B by 1.3e-4, just over its tolerance, and ours, behind the mixer, by 0.4e-4; "
        "tests/tuners/layers/test_kinds.py checks that every tensor learns",
    ),
    (
        r"test_add_weighted_adapter_with_different_scaling\[magnitude_prune_svd-0.9-0.1-weights2\]",
        ("eigenlora-full",),
        "bounds the absolute error, as suits updates of rank 8; the mixer's random update has every rank. The correlation, "
        "which it asserts first, is met",
    ),
    (
        r"TestEncoderDecoderModels::test_generate_with_mixed_adapter_batches\[LoraConfig-config_kwargs14-.*Bart",
        ("eigenlora-diagonal",),
        "first asserts that a random start changes what a tiny model generates; that of a few numbers a module does not",
    ),
    (
        r"test_lora_conversion\[LoraConfig-config_kwargs16-.*Gemma3",
        ("eigenlora-diagonal",),
        "bounds the error of truncating to rank 8 an update that has rank 16, with singular values as random as its entries",
    ),
    (
        r"test_disable_adapters_with_merging\[Embedding \+ transformers Conv1D 2 DoRA",
        ("eigenlora-diagonal",),
        "asserts that three steps of Adam change the output by 1e-4; those of five numbers change it by less",
    ),
    (
        r"test_parameters_after_loading_model\[Vanilla MLP 1 LoRA with lora_b bias",
        ("moslora",),
        "its learning rate of 0.5 ends in NaN with a mixer and a bias; tests/tuners/host/test_lora_options.py has biases that "
        "learn and come back",
    ),
    (
        r"TestLoraInitialization::test_(lora_)?(pissa|olora)_conversion_same_output|"
        r"TestCordaInitialization::test_lora_corda_(linear_init|hooked_model_linear_init|conversion_same_output)",
        ("moslora",),
        "writes into LoRA's weight in place, after the start, which it finds to be right; tests/tuners/moslora/"
        "test_written_starts.py has the start, its training and the conversion",
    ),
    (
        r"TestLoraInitialization::test_lora_mica_(embedding_init_default|freezes_B)",
        ("moslora",),
        "asserts that nothing of lora_B is trained; ours freezes B itself and trains the mixer, which "
        "tests/tuners/moslora/test_written_starts.py checks",
    ),
    (
        r"TestKasaRegularization::test_kasa_orthogonal_reg_zero_for_orthonormal_factors",
        ("eigenlora", "moslora"),
        "writes orthonormal factors into LoRA's weights in place; tests/tuners/layers/test_blocks.py has the loss",
    ),
    (
        r"TestKasaRegularization::test_kasa_loss_has_gradients",
        ("eigenlora",),
        "asks LoRA's weight for its gradient; that of ours is the coefficients', which tests/tuners/layers/test_blocks.py checks",
    ),
    (
        r"TestLoraInitialization::test_lora_embedding_(default|gaussian)",
        ("moslora",),
        "asserts the distribution of LoRA's B alone; ours is B times the mixer",
    ),
    (
        r"TestLoraInitialization::test_lora_(linear|embedding|conv2d)_(init_)?(default|gaussian)",
        ("eigenlora",),
        "asserts the distribution of LoRA's own factors' entries; ours are coefficients times components",
    ),
    (
        r"(test_modules_to_save_targets_lora_layer|test_trainable_token_indices_targets_lora_layer|"
        r"TestTargetingAuxiliaryTrainingWrapper::test_targeting_trainable_tokens)_raises",
        ("eigenlora", "moslora"),
        "the message that it expects names LoRA's layer class; ours has its own name in its place",
    ),
    (
        r"test_converted_lora_to_lora_works_and_warns",
        ("eigenlora", "moslora"),
        "expects the warning that the adapter is a LoRA already",
    ),
    (
        r"test_inject_from_state_dict_missing_keys_warning",
        ("eigenlora", "moslora"),
        "deletes LoRA's tensors from a state dict by name",
    ),
    (
        r"test_loraplus.py::test_lora_plus_embedding_lr",
        ("eigenlora", "moslora"),
        "lists LoRA's tensors by name",
    ),
    (
        r"TestTargetParameters::test_target_multiple_parameters_on_same_module",
        ("eigenlora", "moslora"),
        "counts two tensors a parameter, as LoRA has",
    ),
    (
        r"TestTargetParameters::(test_target_parameters_works_with_existing_parametrization|"
        r"test_targeting_module_and_targeting_param_equivalent)",
        ("eigenlora", "moslora"),
        "writes into LoRA's weights in place; ours are computed from the trained tensors, and "
        "tests/tuners/layers/test_kinds.py checks that a weight is adapted as its module is",
    ),
    (
        r"TestModelAndLayerStatus::test_model_(status_with_modules_to_save|status_with_trainable_tokens|"
        r"target_parameters|target_parameters_and_target_modules)$",
        ("eigenlora", "moslora"),
        "asserts the class name LoraModel and LoRA's number of parameters",
    ),
    (
        r"TestPeftCustomKwargs::test_add_second_adapter_with_all_linear_works",
        ("eigenlora", "moslora"),
        "asserts that the factors are torch.nn.Linear",
    ),
    (
        r"TestTunerStateDictKeyPrefixes::test_prefixes_select_correct_state_dict_keys",
        ("eigenlora", "moslora"),
        "lists LoRA's tensors by name",
    ),
)


def reason_not_applicable(name: str, label: str) -> str | None:
    """Why a failing test says nothing about a method, or None.

    Args:
        name: The test's node id.
        label: "moslora", or "eigenlora-" and the core.
    """
    for pattern, methods, reason in NOT_APPLICABLE:
        if label.startswith(methods) and re.search(pattern, name):
            return reason
    return None
