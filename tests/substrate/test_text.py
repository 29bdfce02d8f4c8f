"""Tokenizers: what encodes comes back, the rest is refused; turns are those of transformers."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro.config import UserError
from jaxrepro.data import chat, text
from jaxrepro.data.questions import Encoder
from jaxrepro.data.text import IM_END, SPECIAL, closed_vocabulary, load_tokenizer

WORDS = ["cat", "cats", "3", "-3", "13", "-", "+", "two words"]
LINES = ["# Head:\n", "\n", "\n\n"]


@pytest.fixture(scope="module")
def tokenizer():
    return closed_vocabulary([*WORDS, *LINES])


@given(st.lists(st.sampled_from([*WORDS, *LINES, *SPECIAL]), max_size=12))
@settings(deadline=None, max_examples=100)
def test_text_of_pieces_comes_back(tokenizer, pieces):
    decoded = tokenizer.decode([tokenizer.id(p) for p in pieces], skip_special=False)
    try:
        ids = tokenizer.encode(decoded)
    except UserError:
        # Only a pair that reads as one longer piece ("-" "3" has a space, so lines alone can do it).
        assert "\n\n" in decoded
    else:
        assert tokenizer.decode(ids, skip_special=False) == decoded


@given(st.text(alphabet="cats 3-+\n1|<>#", max_size=12) | st.text(max_size=6))
@settings(deadline=None, max_examples=200)
def test_any_text_comes_back_or_is_refused(tokenizer, string):
    try:
        ids = tokenizer.encode(string)
    except UserError:
        return
    assert tokenizer.decode(ids, skip_special=False) == string


def test_longest_piece_wins_and_spaces_cost_nothing(tokenizer):
    assert tokenizer.encode("cats 13 -3 - 3") == [
        tokenizer.id(p) for p in ("cats", "13", "-3", "-", "3")
    ]


@pytest.mark.parametrize(
    "bad", ["dog", "cat  3", " cat", "cat ", "133", "cat\n 3", "\ud800", "<|unk|>"]
)
def test_text_outside_the_vocabulary_is_refused_in_one_line(tokenizer, bad):
    with pytest.raises(UserError) as error:
        tokenizer.encode(bad)
    assert "\n" not in str(error.value)


def test_unknown_text_can_become_the_unknown_id(tokenizer):
    assert tokenizer.encode("dog cat", unknown="id") == [
        tokenizer.id(text.UNKNOWN),
        tokenizer.id("cat"),
    ]


def test_skip_special_leaves_out_special_tokens(tokenizer):
    ids = tokenizer.encode("cat 3" + IM_END)
    assert ids[-1] == tokenizer.eos and tokenizer.decode(ids) == "cat 3"


def test_saved_tokenizer_is_the_same_here_and_in_transformers(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    string = f"# Head:\ncat + 3\n\ntwo words{IM_END}\n"
    ids = tokenizer.encode(string)
    assert load_tokenizer(tmp_path).encode(string) == ids
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(string)["input_ids"] == ids and theirs.decode(ids) == string
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos, tokenizer.pad)


def test_a_byte_level_tokenizer_of_a_folder_is_wrapped(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    bytes_ = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(bytes_, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    backend.save(str(tmp_path / "tokenizer.json"))
    wrapped = load_tokenizer(tmp_path)
    string = "any  text, ünïcode 日本" + IM_END
    assert wrapped.decode(wrapped.encode(string), skip_special=False) == string
    assert wrapped.encode(string)[-1] == wrapped.eos and not wrapped.closed


@pytest.mark.parametrize("piece", ["", " a", "a ", "<|x|>"])
def test_a_piece_that_could_not_come_back_is_refused(piece):
    with pytest.raises(UserError):
        closed_vocabulary([piece])


def test_a_broken_tokenizer_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


# ---- chat templates

LLAMA3 = (
    "{{- bos_token }}{% for m in messages %}"
    "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = """{{ bos_token }}
{%- for m in messages %}
    {%- if m['role'] == 'user' %}
        {{- '[INST] ' + m['content'] + ' [/INST]' }}
    {%- elif m['role'] == 'assistant' %}
        {{- ' ' + m['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}"""
HEADERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
KINDS = {  # special tokens, bos, eos, template, end of a turn, may have a system turn
    "llama3": ([*HEADERS, "<|eot_id|>"], HEADERS[0], HEADERS[1], LLAMA3, "<|eot_id|>", True),
    "mistral": (["<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>", MISTRAL, "</s>", False),
    "chatml": (list(SPECIAL), None, text.ENDOFTEXT, text.CHATML, IM_END, True),
    "no template": (list(SPECIAL), None, text.ENDOFTEXT, None, IM_END, True),
}


def model_folder(folder, kind, *, vocabulary=None):
    """Byte-level tokenizer files as a model of that kind has them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special, bos, eos, template, _, _ = KINDS[kind]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocabulary or {c: i for i, c in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    config |= {"bos_token": bos and {"__type": "AddedToken", "content": bos}, "eos_token": eos}
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_and_answers_have_the_ids_of_transformers(kind, system, tmp_path):
    from transformers import AutoTokenizer

    _, _, _, template, end, takes_system = KINDS[kind]
    ours = load_tokenizer(model_folder(tmp_path, kind))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs.chat_template = template or text.CHATML
    assert ours.eos == theirs.convert_tokens_to_ids(end)
    encoder = Encoder(ours, 512, 64, system=system)
    example = {"id": "x", "problem": "How many <b>eggs</b> & ünïcode 日本?", "solution": "12"}
    if system and not takes_system:
        with pytest.raises(UserError, match=r"^[^\n]*are supported!\); .* set data\.system=''$"):
            encoder.prompt(example)
        return
    asked = [{"role": "system", "content": system}] * bool(system)
    asked += [{"role": "user", "content": example["problem"]}]
    wanted = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert encoder.prompt(example) == wanted
    turn = [*asked, {"role": "assistant", "content": example["solution"]}]
    whole = theirs.apply_chat_template(turn, return_dict=False)
    row = [*encoder.prompt(example), *encoder.completion(example)]
    assert row == whole[: len(row)] and ours.decode(whole[len(row) :]).strip() == ""


@pytest.mark.parametrize("kind", ["llama3", "mistral"])
def test_rows_are_padded_with_the_configured_pad_or_else_the_end_of_turn(kind, tmp_path):
    ours = load_tokenizer(model_folder(tmp_path, kind))
    assert ours.pad == ours.eos
    end = KINDS[kind][2]
    assert text.Tokenizer(ours.backend, template=ours.template, named={"pad_token": end}).pad == (
        ours.id(end)
    )


def test_of_several_templates_the_default_is_used(tmp_path):
    path = model_folder(tmp_path, "mistral") / "tokenizer_config.json"
    both = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": LLAMA3}]
    path.write_text(json.dumps({"chat_template": both}))
    assert load_tokenizer(tmp_path).template == LLAMA3
    (tmp_path / "chat_template.jinja").write_text(MISTRAL)
    assert load_tokenizer(tmp_path).template == MISTRAL


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[9]['content'].x }}", r"the chat template fails \(UndefinedError: "),
        ("{% for", r"the chat template fails \(TemplateSyntaxError: "),
        ("{{ messages.__class__.__mro__[1].x }}", r"the chat template fails \("),
        (None, r"no chat template, and <\|im_start\|> or .*put the chat_template\.jinja"),
    ],
)
def test_templates_that_fail_or_are_missing_are_one_line(template, message, tmp_path):
    backend = load_tokenizer(model_folder(tmp_path, "mistral")).backend
    tokenizer = text.Tokenizer(backend, template=template)
    for ask in (lambda: tokenizer.eos, lambda: chat.prompt(tokenizer, "how", system="")):
        with pytest.raises(UserError, match=f"^[^\n]*{message}[^\n]*$"):
            ask()


def test_a_template_that_ends_a_turn_with_text_needs_a_configured_eos(tmp_path):
    backend = load_tokenizer(model_folder(tmp_path, "mistral")).backend
    plain = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
    tokenizer = text.Tokenizer(backend, template=plain, named={"eos_token": "</s>"})
    assert tokenizer.eos == tokenizer.id("</s>")
    with pytest.raises(UserError, match="no special token: name the eos_token"):
        text.Tokenizer(backend, template=plain).eos  # noqa: B018
    with pytest.raises(UserError, match="leaves out what the assistant says"):
        text.Tokenizer(backend, template="{{ messages[0]['content'] }}").eos  # noqa: B018


@pytest.mark.parametrize("token", ["[INST]", IM_END])
def test_special_tokens_of_any_kind_are_refused_in_a_question(token, tmp_path):
    tokenizer = load_tokenizer(model_folder(tmp_path, "mistral"))
    with pytest.raises(UserError, match="the question contains the special token"):
        chat.prompt(tokenizer, f"how {token}", system="")


def test_an_id_beyond_the_vocabulary_of_the_model_is_refused_though_the_count_fits(tmp_path):
    letters = {c: i for i, c in enumerate("abc")}
    folder = model_folder(tmp_path, "chatml", vocabulary=letters | {IM_END: 5000})
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.vocab_size, tokenizer.id(IM_END)) == (9, 5000)
    with pytest.raises(UserError, match=r"largest id is \d+, the model's vocabulary has 5000"):
        tokenizer.check_fits(5000)
    tokenizer.check_fits(max(tokenizer.backend.get_vocab().values()) + 1)
