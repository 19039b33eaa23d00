"""Models of the transformers library, unmodified, against what they are under torch alone."""

import copy
import functools
import json

import pytest
import torch
from models import (
    DTYPES,
    HALVES,
    SEED,
    assert_rounded_once,
    assert_same_bits,
    assert_same_distribution,
    assert_same_structure,
    built,
    plain,
    random_names,
    registered,
    same_bits,
    samples,
    ties,
)

import fastinit

transformers = pytest.importorskip("transformers")

TOKENS = torch.arange(1, 9).view(1, 8)


def _gpt2():
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=40)
    return transformers.GPT2LMHeadModel(config)


def _llama():
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=99,
        pad_token_id=3,
    )
    return transformers.LlamaForCausalLM(config)


def _llama_long_context():
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=99,
        max_position_embeddings=256,
        rope_parameters=scaling,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def _mixtral():
    config = transformers.MixtralConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=99,
    )
    return transformers.MixtralForCausalLM(config)


def _bert():
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
    )
    return transformers.BertForPreTraining(config)


def _t5():
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=56, num_layers=2, num_heads=4, vocab_size=99, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def _vit():
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
    )
    return transformers.ViTForImageClassification(config)


def _whisper():
    config = transformers.WhisperConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=56,
        decoder_ffn_dim=56,
        vocab_size=99,
        num_mel_bins=10,
        max_source_positions=12,
        max_target_positions=16,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
        decoder_start_token_id=2,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return transformers.WhisperForConditionalGeneration(config)


def _mamba():
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=99, state_size=8)
    return transformers.MambaForCausalLM(config)


def _clip():
    tower = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config={**tower, "vocab_size": 99, "eos_token_id": 2},
        vision_config={**tower, "image_size": 16, "patch_size": 4},
        projection_dim=24,
    )
    return transformers.CLIPModel(config)


MODELS = {
    "gpt2": (_gpt2, lambda dtype: {"input_ids": TOKENS}),
    "llama": (_llama, lambda dtype: {"input_ids": TOKENS}),
    "llama-long-context": (_llama_long_context, lambda dtype: {"input_ids": TOKENS}),
    "mixtral": (_mixtral, lambda dtype: {"input_ids": TOKENS}),
    "bert": (_bert, lambda dtype: {"input_ids": TOKENS}),
    "t5": (_t5, lambda dtype: {"input_ids": TOKENS, "labels": TOKENS}),
    "vit": (_vit, lambda dtype: {"pixel_values": torch.linspace(-1, 1, 768, dtype=dtype).view(1, 3, 16, 16)}),
    "whisper": (
        _whisper,
        lambda dtype: {
            "input_features": torch.linspace(-1, 1, 240, dtype=dtype).view(1, 10, 24),
            "decoder_input_ids": TOKENS,
        },
    ),
    "mamba": (_mamba, lambda dtype: {"input_ids": TOKENS}),
    "clip": (
        _clip,
        lambda dtype: {
            "input_ids": TOKENS,
            "pixel_values": torch.linspace(-1, 1, 768, dtype=dtype).view(1, 3, 16, 16),
        },
    ),
}
over_models = pytest.mark.parametrize("name", MODELS)


@functools.cache
def reference(name):
    """Torch's own fp32 model, and the names of what is random in it."""
    constructor = MODELS[name][0]
    return plain(constructor), random_names(constructor)


@over_models
@pytest.mark.parametrize("dtype", DTYPES)
def test_structure_ties_and_buffers_are_those_of_torch_in_the_same_default_dtype(name, dtype):
    constructor = MODELS[name][0]
    assert_same_structure(built(constructor, dtype), plain(constructor, dtype))


@over_models
def test_values_are_those_of_the_fp32_model_rounded_once(name):
    constructor = MODELS[name][0]
    theirs, random = reference(name)
    exact = built(constructor)
    for tensor_name, tensor in registered(exact).items():
        if tensor_name not in random:
            assert same_bits(tensor, registered(theirs)[tensor_name]), tensor_name
    for dtype in HALVES:
        stored = built(constructor, dtype)
        assert_rounded_once(stored, exact)
        assert_same_bits(stored, built(constructor, dtype))


@over_models
def test_random_parameters_follow_the_library_distributions(name):
    constructor = MODELS[name][0]
    _, random = reference(name)
    assert random
    ours = samples(lambda seed: built(constructor, seed=seed), random, at_least=3000, most=3)
    theirs = samples(lambda seed: plain(constructor, seed=seed + 1), random, at_least=3000, most=3)
    for tensor_name in random:
        assert_same_distribution(ours[tensor_name], theirs[tensor_name], tensor_name)


def logits(name, model, dtype):
    output = model(**MODELS[name][1](dtype))
    return output.logits_per_text if name == "clip" else output[1] if name == "t5" else output[0]


@over_models
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_model_computes_something_finite_in_the_dtype_it_has_in_torch(name, dtype):
    constructor = MODELS[name][0]
    with torch.no_grad():
        ours, theirs = (logits(name, make(constructor, dtype).eval(), DTYPES[dtype]) for make in (built, plain))
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert torch.isfinite(ours).all() and ours.any()


@over_models
def test_the_model_trains_a_step(name):
    model = built(MODELS[name][0], "bf16").train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        logits(name, model, torch.bfloat16).float().square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)


@over_models
def test_each_parameter_is_filled_once_although_it_is_initialized_twice(name):
    constructor = MODELS[name][0]
    _, random = reference(name)
    with fastinit.on("cpu", "bf16", seed=SEED) as report:
        model = constructor()
    parameters = dict(model.named_parameters())
    assert report.parameters == sum(p.numel() for p in parameters.values())
    assert report.bytes == sum(p.nbytes for p in parameters.values())
    # Each tensor takes one fill, one more for a row of padding, none if torch computes its values; the modules' own
    # init, which the library's replaces, is dropped.
    tensors = registered(model)
    distinct = {id(tensor): tensor_name for tensor_name, tensor in tensors.items() if tensor.is_floating_point()}
    assert report.fills_executed <= len(distinct) + 2, str(report)
    assert report.fills_executed >= len({id(tensors[tensor_name]) for tensor_name in random})
    assert report.fills_dropped > 0


def test_ties_are_kept():
    model = built(_gpt2, "bf16")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert ties(model)[0] == [["transformer.wte.weight", "lm_head.weight"]]
    assert ties(built(_llama, "bf16"))[0] == []
    assert ties(built(_llama_long_context, "bf16"))[0] == [["model.embed_tokens.weight", "lm_head.weight"]]


def test_the_padding_row_of_an_embedding_is_zero():
    for dtype in DTYPES:
        model = built(_llama, dtype)
        assert not model.model.embed_tokens.weight[3].any()
        assert model.model.embed_tokens.weight.any(dim=1).sum() == 98


def test_rotary_frequencies_stay_in_the_precision_that_the_library_names():
    inverse_frequencies = built(_llama, "bf16").model.rotary_emb.inv_freq
    assert inverse_frequencies.dtype == torch.float32
    expected = 1.0 / (10000.0 ** (torch.arange(0, 8, 2, dtype=torch.int64).float() / 8))
    assert same_bits(inverse_frequencies, expected)


def test_the_library_finds_its_own_functions_again():
    before = {n: f for n, f in vars(torch.nn.init).items() if callable(f)}
    built(_gpt2, "bf16")
    assert {n: f for n, f in vars(torch.nn.init).items() if callable(f)} == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_saved_model_loads_inside_the_context(tmp_path, dtype):
    saved = built(_gpt2, dtype, seed=1)
    saved.save_pretrained(tmp_path)
    with fastinit.on("cpu", dtype, seed=2):
        loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=DTYPES[dtype])
    assert_same_bits(loaded, saved)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_a_model_made_from_its_configuration_with_a_named_dtype():
    def construct():
        return transformers.AutoModelForCausalLM.from_config(_gpt2().config, dtype=torch.bfloat16)

    assert_same_structure(built(construct, "fp32"), plain(construct, "fp32"))
    assert_same_structure(built(construct, "bf16"), plain(construct, "bf16"))


def test_a_copy_of_a_model_is_a_model_of_its_own():
    def construct():
        first = _gpt2()
        return torch.nn.ModuleList([first, copy.deepcopy(first)])

    pair = built(construct, "bf16")
    assert_same_structure(pair, plain(construct, "bf16"))
    assert_same_bits(pair[0], pair[1])
    assert pair[0].lm_head.weight.data_ptr() != pair[1].lm_head.weight.data_ptr()


# --- other ways to a model --------------------------------------------------------------------------------------------


AUTO_CLASSES = {
    "bert": "AutoModelForPreTraining",
    "t5": "AutoModelForSeq2SeqLM",
    "vit": "AutoModelForImageClassification",
    "whisper": "AutoModelForSpeechSeq2Seq",
    "clip": "AutoModel",
}


@over_models
def test_auto_classes_make_the_model_that_its_class_makes(name):
    constructor = MODELS[name][0]
    direct = built(constructor, "bf16")
    auto = getattr(transformers, AUTO_CLASSES.get(name, "AutoModelForCausalLM"))
    with fastinit.on("cpu", "bf16", seed=SEED) as report:
        model = auto.from_config(direct.config)
    assert type(model) is type(direct) and report.fills_dropped > 0
    assert_same_bits(model, direct)


@over_models
@pytest.mark.parametrize("options", [{"empty": True}, {"shard": True}], ids=str)
def test_what_is_left_for_later_becomes_the_same_model(name, options):
    constructor = MODELS[name][0]
    with fastinit.on("cpu", "bf16", seed=SEED, **options) as report:
        model = constructor()
    assert report.fills_deferred > 0
    unwritten = set(fastinit.uninitialized(model))
    parameters = {each for each, _ in model.named_parameters()}
    # What the constructor computes, or reads, has its values in any case.
    assert unwritten and unwritten <= parameters
    assert fastinit.materialize(model) and not fastinit.uninitialized(model)
    assert_same_bits(model, built(constructor, "bf16"))


# --- checkpoints of every architecture --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function that gives the class of a model and the folder where a checkpoint of it lies."""
    safetensors = pytest.importorskip("safetensors.torch")

    @functools.cache
    def save(name, lacking=()):
        model = plain(MODELS[name][0], seed=5)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        if lacking:
            state = safetensors.load_file(folder / "model.safetensors")
            assert state.keys() >= set(lacking)
            kept = {key: tensor for key, tensor in state.items() if key not in lacking}
            safetensors.save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        return type(model), folder

    return save


@over_models
@pytest.mark.parametrize(
    "options", [{}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}, "dtype": "float16"}], ids=["", "map", "dtype"]
)
def test_every_architecture_loads_in_the_block_without_a_fill(saved, name, options):
    cls, folder = saved(name)
    with fastinit.on("cpu", "bf16", seed=SEED) as report:
        model = cls.from_pretrained(folder, **options)
    expected = plain(lambda: cls.from_pretrained(folder, **options), "bf16")
    assert_same_structure(model, expected)
    assert_same_bits(model, expected)
    # Mamba computes with ones, a layer's decay, and no checkpoint has BERT's buffer of token types, which is zeros:
    # these are no inits of what is loaded.
    assert report.fills_executed == {"mamba": 2, "bert": 1}.get(name, 0), str(report)


LACKING = (
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.0.input_layernorm.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
)


def test_missing_keys_get_their_recorded_initialization(saved):
    cls, folder = saved("llama", LACKING)

    def load(dtype="fp32", **options):
        with fastinit.on("cpu", dtype, seed=SEED, **options) as report:
            return cls.from_pretrained(folder, dtype=DTYPES[dtype]), report

    exact, report = load()
    theirs = plain(lambda: cls.from_pretrained(folder, dtype=torch.float32))
    assert_same_structure(exact, theirs)
    for name, tensor in registered(exact).items():
        expected = registered(theirs)[name]
        if name not in LACKING or name.endswith("norm.weight"):
            assert same_bits(tensor, expected), name
        else:
            assert_same_distribution(tensor.detach(), expected.detach(), name)
    # One fill each, and one for the row of padding.
    assert report.fills_executed == len(LACKING) + 1, str(report)
    assert not exact.model.embed_tokens.weight[3].any()
    stored, _ = load("bf16")
    assert_rounded_once(stored, exact)


def test_missing_keys_are_named_and_written_later_with_empty(saved):
    cls, folder = saved("llama", LACKING)
    with fastinit.on("cpu", "bf16", seed=SEED, empty=True) as report:
        model = cls.from_pretrained(folder, dtype=torch.bfloat16)
    random = {name for name in LACKING if not name.endswith("norm.weight")}
    assert set(fastinit.uninitialized(model)) == random
    assert report.fills_executed == 1, str(report)
    with pytest.raises(RuntimeError, match="nothing has written"):
        model(TOKENS)
    assert set(fastinit.initialize(model)) == random
    assert_same_bits(model, built(lambda: cls.from_pretrained(folder, dtype=torch.bfloat16), "bf16"))
    assert torch.isfinite(model(TOKENS).logits).all()


def test_a_loaded_model_is_loaded_whole_also_with_shard(saved):
    cls, folder = saved("gpt2")
    with fastinit.on("cpu", "bf16", seed=SEED, shard=True):
        model = cls.from_pretrained(folder, dtype=torch.bfloat16)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert_same_bits(model, plain(lambda: cls.from_pretrained(folder, dtype=torch.bfloat16)))


# --- Trainer ----------------------------------------------------------------------------------------------------------


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        tokens = (torch.arange(8) * (index + 1)) % 97 + 1
        return {"input_ids": tokens, "labels": tokens}


def _trainer(folder, model=None, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        logging_steps=1,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=Sentences(), **options)


@pytest.fixture
def trainer():
    state = pytest.importorskip("accelerate.state")
    state.AcceleratorState._reset_state(True)
    with torch.random.fork_rng():
        yield _trainer
    state.AcceleratorState._reset_state(True)


def _losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_trains_the_model_as_one_that_torch_made_with_the_same_values(trainer, tmp_path):
    model = built(_llama)
    same = plain(_llama)
    same.load_state_dict(model.state_dict())
    runs = [trainer(tmp_path / each, of) for each, of in (("ours", model), ("theirs", same))]
    for run in runs:
        run.train()
    assert len(_losses(runs[0])) == 3 and _losses(runs[0]) == _losses(runs[1])
    assert_same_bits(model, same)


def test_trainer_calls_a_function_that_makes_the_model_in_the_block(trainer, tmp_path):
    reports = []

    def make():
        with fastinit.on("cpu", "fp32") as report:
            model = _gpt2()
        reports.append(report)
        return model

    run = trainer(tmp_path, model_init=make)
    run.train()
    first = reports[-1].seed
    # Trainer seeds torch before it asks for the model, so that it is the same each time.
    assert all(report.seed == first for report in reports)
    assert all(report.fills_executed and report.fills_dropped for report in reports)
    assert all(torch.isfinite(parameter).all() for parameter in run.model.parameters())


def test_trainer_resumes_a_model_that_was_made_empty(trainer, tmp_path):
    whole = trainer(tmp_path, built(_llama))
    whole.train()
    with fastinit.on("cpu", seed=SEED + 1, empty=True):
        model = _llama()
    assert fastinit.uninitialized(model)
    resumed = trainer(tmp_path, model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2
    assert_same_bits(model, whole.model)


def test_what_trainer_saves_loads_in_the_block(trainer, tmp_path):
    run = trainer(tmp_path, built(_gpt2))
    run.train()
    run.save_model(str(tmp_path / "saved"))
    with fastinit.on("cpu", "fp32", seed=SEED) as report:
        model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "saved")
    assert report.fills_executed == 0
    assert_same_bits(model, run.model)
