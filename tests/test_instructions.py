"Instruction data: recognition, templates of many models, loss mask, the border between prompt and answer, files, faults."
import json, math
from types import SimpleNamespace
import duckdb, numpy as np, pandas as pd, pyarrow.parquet as pq, pytest, torch
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from yunmin_efficientdata.core.ledger import Ledger
from yunmin_efficientdata.core.records import dump_line
from yunmin_efficientdata.core.settings import Settings, UserError
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.format import instructions as I
from yunmin_efficientdata.format.instructions import (CHATML, INSTRUCTION_MANIFEST, BadRecord, InstructionRows, Renderer, check_example, check_inference, collate,
    instruction_files, instruction_inputs, output_names, prepare, recognise, rows_of, template_of, write_instructions)
from yunmin_efficientdata.format.loader import TokenPages
from yunmin_efficientdata.format.pages import TokenFile
from yunmin_efficientdata.format.tokenizer import as_pretrained, load_tokenizer, save_tokenizer, train_bpe

SENTENCES = ["대한민국의 수도는 서울이다.", "서울의 인구는 약 940만 명이다.", "법원은 항소를 기각하였다.", "\n\n서울\n\n", "한 줄\n\n두 줄\n\n\n세 줄", "def f(x):\n    return x"]
U, A, S, T = (lambda c, r=r: {"role": r, "content": c} for r in ("user", "assistant", "system", "tool"))

# Templates as the models ship them (shortened where they handle tools or pictures), none with {% generation %} unless it says so.
LLAMA3 = ("{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
QWEN25 = ("{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}{%- else %}{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
          "{%- for message in messages %}{%- if message.role != 'system' %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
          "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}")
QWEN3 = ("{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
         "{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set content = m.content %}{%- set thought = m.reasoning_content or '' %}"
         "{%- if '</think>' in content %}{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
         "{%- if loop.index0 > ns.last %}{{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content + '<|im_end|>\n' }}"
         "{%- else %}{{- '<|im_start|>assistant\n' + content + '<|im_end|>\n' }}{%- endif %}{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
         "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}")
MISTRAL = ("{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
           "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}")
GEMMA = ("{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
         "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}")
LLAMA2 = ("{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
          "{% for message in loop_messages %}{% if loop.index0 == 0 and system_message %}{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
          "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}{% else %}{{ ' ' + content | trim + ' ' + eos_token }}{% endif %}{% endfor %}")
ALPACA = ("{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + '\n\n' }}{% elif m.role == 'system' %}{{ m.content + '\n\n' }}{% else %}{{ '### Instruction:\n' + m.content + '\n\n### Response:\n' }}{% endif %}{% endfor %}")
ZEPHYR = ("{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}")
TEMPLATES = {"llama3": (LLAMA3, []), "qwen2.5": (QWEN25, []), "qwen3": (QWEN3, []), "mistral": (MISTRAL, ["a system prompt"]), "gemma": (GEMMA, ["a system prompt"]), "llama2": (LLAMA2, []),
             "alpaca": (ALPACA, []), "zephyr": (ZEPHYR, []), "chatml": (CHATML, []), "ours": (None, [])}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<s>"]


def bpe_tokenizer(template=None):
    t = as_pretrained(train_bpe(SENTENCES * 20, 420))
    t.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": SPECIAL[:-1]})
    if template: t.chat_template = template
    return t

@pytest.fixture(scope="module")
def tokenizer(): return bpe_tokenizer()

@pytest.fixture(scope="module", params=["first", "always", "never"])
def metaspace(request):
    "A SentencePiece-like tokenizer, which may put a space before a text."
    t = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=request.param, split=request.param != "never")
    t.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme=request.param), decoders.ByteFallback(), decoders.Fuse()])
    t.train_from_iterator(SENTENCES * 20, trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)], show_progress=False))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False)
    wrapped.add_special_tokens({"additional_special_tokens": SPECIAL[:-1]})
    return wrapped

def learned(tokenizer, labels): return tokenizer.decode(labels[labels != -100])

def encode(renderer, messages):
    got = renderer.encode([renderer.spans(messages)])[0]
    if isinstance(got, BadRecord): raise got
    return got

# -- recognition ---------------------------------------------------------

@pytest.mark.parametrize("record,kind,said", [
    ({"instruction": "가", "input": "나", "output": "다"}, "instruction", ["u가\n\n나", "a다"]),
    ({"instruction": "가", "input": "", "output": "다"}, "instruction", ["u가", "a다"]),
    ({"prompt": "가", "completion": "다"}, "instruction", ["u가", "a다"]),
    ({"question": "가", "answer": "다", "system": "라"}, "instruction", ["s라", "u가", "a다"]),
    ({"instruction": "가", "output": "다", "history": [["라", "마"], ["바", "사"]]}, "instruction", ["u라", "a마", "u바", "a사", "u가", "a다"]),
    ({"messages": [S("라"), U("가"), A("다")]}, "conversation", ["s라", "u가", "a다"]),
    ({"conversations": [{"from": "human", "value": "가"}, {"from": "gpt", "value": "다"}], "system": "라"}, "conversation", ["s라", "u가", "a다"]),
    ({"messages": [{"role": "developer", "content": "라"}, {"role": "USER", "content": [{"type": "text", "text": "가"}, {"type": "text", "text": "나"}]}, A("다")]}, "conversation", ["s라", "u가나", "a다"]),
    ({"messages": [U("가"), A("다")], "prompt": "가"}, "conversation", ["u가", "a다"]),
    ({"prompt": "가", "chosen": "다", "rejected": "라"}, "preference", ["u가", "a다"]),
    ({"prompt": "가", "chosen": [U("가"), A("다")], "rejected": [U("가"), A("라")]}, "preference", ["u가", "a다"]),
    ({"chosen": [U("가"), A("다")], "rejected": [U("가"), A("라")], "system": "마"}, "preference", ["s마", "u가", "a다"]),
    ({"conversations": [{"from": "human", "value": "가"}], "chosen": {"from": "gpt", "value": "다"}, "rejected": {"from": "gpt", "value": "라"}}, "preference", ["u가", "a다"]),
    ({"prompt": [S("마"), U("가")], "chosen": [A("다")], "rejected": [A("라")], "score": 3}, "preference", ["s마", "u가", "a다"]),
    ({"prompt": "가", "response": "다", "score": "4.5"}, "scored", ["u가", "a다"]),
    ({"prompt": "가", "completion": "다", "label": True}, "scored", ["u가", "a다"]),
    ({"messages": [U("가"), A("다")], "reward": -1}, "scored", ["u가", "a다"])])
def test_recognised(record, kind, said):
    example = recognise(json.loads(json.dumps(record)))
    check_example(example)
    assert example.kind == kind and [m["role"][0] + m["content"] for m in example.messages] == said
    assert math.isnan(example.score) == (kind != "scored")

@pytest.mark.parametrize("record,reason", [
    ({"text": "글"}, "unknown_fields"), ({}, "unknown_fields"), ({"prompt": "가"}, "unknown_fields"), ({"prompt": "가", "response": ""}, "empty_response"), ({"prompt": "  ", "response": "나"}, "empty_prompt"),
    ({"messages": []}, "no_prompt"), ({"messages": "가"}, "no_answer"), ({"messages": [U("가")]}, "no_answer"), ({"messages": [A("가")]}, "role_order"), ({"messages": [U("가"), U("나"), A("다")]}, "role_order"),
    ({"messages": [U("가"), S("나"), A("다")]}, "role_order"), ({"messages": [{"role": "wizard", "content": "가"}]}, "unknown_role"), ({"messages": [{"content": "가"}]}, "unknown_role"), ({"messages": [7]}, "not_a_message"),
    ({"messages": 7}, "not_text"), ({"messages": [{"role": "user", "content": 7}]}, "not_text"), ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, A("가")]}, "not_text"),
    ({"instruction": "가", "output": 7}, "not_text"), ({"instruction": "가", "output": "나", "history": [["다"]]}, "bad_history"), ({"instruction": "가", "output": "나", "history": 5}, "bad_history"),
    ({"prompt": "가", "chosen": "나", "rejected": "나"}, "same_answers"), ({"chosen": [U("가"), A("나")], "rejected": [U("다"), A("라")]}, "different_prompts"), ({"chosen": "나", "rejected": "라"}, "role_order"),
    ({"prompt": "가", "response": "나", "score": "good"}, "bad_score"), ({"prompt": "가", "response": "나", "score": float("inf")}, "bad_score"), ({"prompt": "가", "response": "나", "score": [1]}, "bad_score"),
    ({"prompt": "<|end|>\n<|assistant|>", "response": "나"}, "control_token"), ({"prompt": "가", "response": "나<|endoftext|>"}, "control_token"), ({"messages": [U("가"), A("나") | {"weight": 0}]}, "nothing_to_learn"),
    ({"messages": [U("가"), T("나"), A("다")]}, "role_order"), ({"messages": [U("가"), A("다")], "tools": "x"}, "template")])
def test_refused_with_a_reason(record, reason, tokenizer):
    (bad,) = rows_of([record], Renderer(tokenizer), 1000)
    assert isinstance(bad, BadRecord) and bad.reason == reason, bad

json_values = st.recursive(st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.sampled_from(["user", "assistant", "system", "가", "", "<|end|>", "\n"]), 
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "text", "tool_calls", "weight", "name"]), v, max_size=4), max_leaves=8)
fields = st.sampled_from(["messages", "conversations", "prompt", "instruction", "input", "output", "response", "chosen", "rejected", "score", "label", "system", "history", "tools", "id", "source", "lang"])

@hypothesis_settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(fields, json_values, max_size=6))
def test_any_record_is_a_row_or_a_reason(tokenizer, record):
    (got,) = rows_of([record], Renderer_of(tokenizer), 200)
    assert isinstance(got, BadRecord) or set(got[0]) == set(I.INSTRUCTION_SCHEMA.names)

_cache = {}
def Renderer_of(tokenizer): return _cache.setdefault(id(tokenizer), Renderer(tokenizer))

# -- templates -----------------------------------------------------------

CONVERSATIONS = [[U("수도는?"), A("서울이다.")], [U("수도는?"), A("서울이다."), U("인구는?"), A("약 940만 명이다.\n끝")], [S("짧게 답한다."), U("가\n\n나"), A("다 라"), U("마"), A("바"), U("사?"), A("아!")]]

@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_models(name, tokenizer):
    template, missing = TEMPLATES[name]
    t = bpe_tokenizer(template)
    r = Renderer(t)
    assert [n for n in r.check() if not any(m in n for m in missing)] == []
    for messages in CONVERSATIONS:
        if messages[0]["role"] == "system" and missing: continue
        tokens, labels, *_ = encode(r, messages)
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        said = learned(t, labels)
        for a in answers: assert a in said
        for m in messages:
            if m["role"] != "assistant": assert m["content"] not in said  # no loss on questions
        # the sign that ends a turn is learned as often as there are answers: a control token, else EOS at the end
        last = labels[labels != -100][-1]
        assert last in r.special_ids
        assert tokens[-1] == t.eos_token_id and t.decode(tokens) in (r.text(messages), r.text(messages) + t.eos_token)
        for i, m in enumerate(messages):  # what inference asks, at every turn, is what was trained
            if m["role"] == "assistant":
                prompt = t.apply_chat_template(messages[:i], add_generation_prompt=True, return_dict=True)["input_ids"]
                assert list(tokens[:len(prompt)]) == prompt and labels[len(prompt)] != -100 and labels[len(prompt) - 1] == -100

def test_generation_keyword_and_incremental_rendering_agree(tokenizer):
    plain = bpe_tokenizer(CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    marked = bpe_tokenizer(CHATML)
    for messages in CONVERSATIONS:
        (a, b, *_), (c, d, *_) = encode(Renderer(plain), messages), encode(Renderer(marked), messages)
        assert np.array_equal(a, c) and np.array_equal(b, d)
        theirs = marked.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert theirs["input_ids"] == c[:-1].tolist() and theirs["assistant_masks"] == (d[:-1] != -100).astype(int).tolist()

@pytest.mark.parametrize("template,why", [
    ("{{ 1/0 }}", "ZeroDivision"), ("{% for %}", "TemplateSyntaxError"), ("", "leaves out"), ("{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ 'A:' }}{% endif %}", "no prefix"),
    ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "SecurityError"), ("{{ cycler.__init__.__globals__ }}", "SecurityError"), ("{{ messages.append(1) }}", "SecurityError"), ("{% include '/etc/passwd' %}", "no loader"),
    ("{% for i in range(1000000000) %}{% endfor %}", "Range too big"),
    (CHATML.replace("{{ message['content'] ~ '<|im_end|>' }}{% endgeneration %}", "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}"), "never learn to stop"),
    (CHATML.replace("{% generation %}{{ message['content'] ~ '<|im_end|>' }}{% endgeneration %}", "{{ message['content'] ~ '<|im_end|>' }}{% generation %}{% endgeneration %}"), "mark"),
    ("{% for m in messages %}{% if m.role == 'assistant' %}{{ 'A:' + m.content }}{% else %}{{ m.content | upper | replace('바', '사') }}{% endif %}{% endfor %}", "leaves out")])
def test_failing_templates_are_refused_in_one_line(template, why, tokenizer):
    with pytest.raises(UserError, match=why) as e: Renderer(tokenizer, template).check()
    assert "\n" not in str(e.value) and "template" in str(e.value)

def test_a_dropped_system_prompt_is_not_lost_in_silence(tokenizer):
    drops = CHATML.replace("{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}")
    r = Renderer(tokenizer, drops)
    assert "does not take a system prompt" in r.check()[0]
    with pytest.raises(BadRecord, match="text_lost"): r.spans(CONVERSATIONS[2])

def test_reasoning_is_learned_where_it_stands():
    t = bpe_tokenizer(QWEN3); r = Renderer(t)
    messages = [U("가"), A("나") | {"reasoning_content": "생각 하나"}, U("다"), A("라") | {"reasoning_content": "생각 둘"}]
    tokens, labels, *_ = encode(r, messages)
    said = learned(t, labels)
    assert "생각 둘" in said and "라" in said and "나" not in said  # the first answer stands without its thoughts, so it is not learned
    with pytest.raises(BadRecord, match="reasoning"): Renderer(t, CHATML).spans(messages[2:])
    with pytest.raises(BadRecord, match="text_lost"): r.spans([U("가"), A("<think>\n생각\n</think>\n\n나"), U("다"), A("라")])  # thoughts inside an earlier text are cut out by this template

def test_tools_and_weights(tokenizer):
    template = ("{% for t in tools or [] %}{{ t.name }};{% endfor %}{% for m in messages %}{{ '<|' ~ ('assistant' if m.role == 'assistant' else 'user') ~ '|>\n' }}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}"
                "{{ m.content ~ '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")
    r = Renderer(tokenizer, template)
    record = {"tools": [{"name": "날씨"}], "messages": [U("서울 날씨?"), {"role": "assistant", "content": None, "tool_calls": [{"name": "날씨", "city": "서울"}]}, {"role": "tool", "content": "맑음"}, A("맑다."), U("확실?"), A("그럼.") | {"weight": 0}]}
    ((row, _),) = rows_of([record], r, 1000)
    said = learned(tokenizer, row["labels"])
    assert '"city": "서울"' in said and "맑다." in said and "그럼." not in said and "맑음" not in said and row["text"].startswith("날씨;")

def test_pinned_date(tokenizer):
    t = CHATML.replace("{% for message", "{{ 'Today: ' ~ strftime_now('%d %b %Y') ~ '\n' }}{% for message", 1)
    assert Renderer(tokenizer, t).text(CONVERSATIONS[0]).startswith("Today: 01 Jan 2026\n") and Renderer(tokenizer, t, "2025-12-24").text(CONVERSATIONS[0]).startswith("Today: 24 Dec 2025\n")

def test_template_order(tokenizer, tmp_path):
    assert template_of(tokenizer) == (tokenizer.chat_template, "tokenizer")
    bare = bpe_tokenizer(); bare.chat_template = None
    assert template_of(bare) == (CHATML, "chatml")
    (tmp_path/"x.jinja").write_text(QWEN25)
    assert template_of(tokenizer, str(tmp_path/"x.jinja")) == (QWEN25, "file")
    with pytest.raises(UserError, match="no such file"): template_of(tokenizer, str(tmp_path/"y.jinja"))

# -- tokens --------------------------------------------------------------

korean = st.text(st.sampled_from(list("가나다서울의 인구는약ㅋㅎ한\n\n\t  .!?<|>1aé😀\u1112\u1161\u200b")), min_size=1, max_size=30).filter(str.strip)

@hypothesis_settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(korean, korean), min_size=1, max_size=3))
def test_round_trip_and_prefix_hold_for_any_text(tokenizer, pairs):
    r = Renderer_of(tokenizer)
    messages = [m for q, a in pairs for m in (U(q), A(a))]
    try: tokens, labels, cut, exact = encode(r, messages)
    except BadRecord as e: assert e.reason == "control_token"; return
    assert exact
    assert tokenizer.decode(tokens[:-1]) == r.text(messages)  # exact, to the last blank
    assert learned(tokenizer, labels) == "".join(a + "<|end|>" for _, a in pairs)
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(tokens[:len(prompt)]) == prompt

def test_a_token_across_the_border_is_cut(tokenizer):
    r = Renderer_of(tokenizer)
    messages = [U("가"), A("\n\n서울\n\n")]
    whole = r.fast.encode(r.text(messages), add_special_tokens=False).ids
    tokens, labels, cut, exact = encode(r, messages)
    assert cut and list(tokens[:-1]) != whole and tokenizer.decode(tokens[:-1]) == tokenizer.decode(whole)
    assert learned(tokenizer, labels) == "\n\n서울\n\n<|end|>"
    assert not encode(r, [U("가"), A("서울")])[2]

@pytest.mark.parametrize("template", ["llama3", "mistral", "llama2", "gemma", "chatml"])
def test_sentencepiece_like_tokenizers(metaspace, template):
    metaspace.chat_template, prepend = TEMPLATES[template][0], json.loads(metaspace.backend_tokenizer.to_str())["pre_tokenizer"]["prepend_scheme"]
    r = Renderer(metaspace)
    r.check()
    for messages in CONVERSATIONS[:2] + [[U("가"), A(" 앞에 빈칸")], [U("가"), A("\n줄")]]:
        try: tokens, labels, cut, exact = encode(r, messages)
        except BadRecord as e: assert e.reason == "border" and (prepend == "always" or messages[-1]["content"][0].isspace()), e; continue  # such a tokenizer writes a blank before any piece
        for i, m in enumerate(messages):
            if m["role"] == "assistant" and not cut:
                prompt = metaspace.apply_chat_template(messages[:i], add_generation_prompt=True, return_dict=True)["input_ids"]
                assert list(tokens[:len(prompt)]) == prompt and labels[len(prompt)] != -100
        assert messages[-1]["content"].strip() in learned(metaspace, labels)

def test_slow_tokenizers_are_refused():
    with pytest.raises(UserError, match="fast tokenizer"): Renderer(SimpleNamespace(is_fast=False))

def test_too_long_is_left_out_never_cut(tokenizer):
    r = Renderer_of(tokenizer)
    record = {"prompt": "가", "chosen": "나", "rejected": "다 " * 300}
    long, ok = rows_of([record, {"prompt": "가", "response": "나"}], r, 60)
    assert long.reason == "too_long" and "60" in long.detail and not isinstance(ok, BadRecord)
    n = ok[0]["length"]
    assert not isinstance(rows_of([{"prompt": "가", "response": "나"}], r, n)[0], BadRecord) and rows_of([{"prompt": "가", "response": "나"}], r, n - 1)[0].reason == "too_long"

def test_batches_do_not_matter(tokenizer):
    r = Renderer_of(tokenizer)
    records = [{"prompt": f"질문 {i}\n", "response": "\n" * (i % 3) + f"답 {i}"} for i in range(40)]
    one = [rows_of([x], r, 500)[0] for x in records]
    for (a, cut_a), (b, cut_b) in zip(rows_of(records, r, 500), one):
        assert np.array_equal(a["tokens"], b["tokens"]) and np.array_equal(a["labels"], b["labels"]) and cut_a == cut_b and a["id"] == b["id"]

# -- files ---------------------------------------------------------------

def made_records(n, seed=0):
    out = []
    for i in range(n):
        k = (i * 7 + seed) % 5
        q, a = f"{i}번 질문: {SENTENCES[i % 3]}", f"{SENTENCES[(i + 1) % 3]} {i}"
        out.append([{"instruction": q, "output": a, "id": f"d{seed}-{i}", "lang": "ko", "license": "CC0"}, {"messages": [U(q), A(a), U("더?"), A("끝.")]}, {"prompt": q, "chosen": a, "rejected": a[::-1]},
                    {"prompt": q, "response": a, "score": i / 10}, {"prompt": q, "response": ""} if i % 2 else {"nothing": i}][k])
    return out

@pytest.fixture
def workspace(tmp_path, tokenizer):
    store = open_store(tmp_path/"ws")
    with store.output("tokenizer") as path: save_tokenizer(bpe_tokenizer(), path)
    source = tmp_path/"in"; (source/"b").mkdir(parents=True)
    lines = [dump_line(r) for r in made_records(300)]
    (source/"a.jsonl").write_bytes(b"".join(lines) + b'{"broken\n\xff\xfe\n[1]\n')
    import gzip, zstandard
    (source/"b/c.jsonl.gz").write_bytes(gzip.compress(b"".join(dump_line(r) for r in made_records(50, 1))))
    (source/"b-c.jsonl.zst").write_bytes(zstandard.compress(b"".join(dump_line(r) for r in made_records(60, 2))))
    (source/"notes.txt").write_text("not data")
    return store, source

def run(store, source, log=None, stop=None, **more):
    settings = Settings(instructions={"path": str(source), **more})
    ctx = SimpleNamespace(store=store, settings=settings, log=log or (lambda text: None), progress=lambda items, *a, **k: iter(items))
    store_in, inputs = instruction_inputs(settings.instructions.path)
    def work(stage):
        if stop:
            mark = stage.mark_part
            def stopping(part, info):
                mark(part, info)
                if len(stage.parts) >= stop: raise KeyboardInterrupt
            stage.mark_part = stopping
        return write_instructions(ctx, stage)
    return Ledger(store).run("format.instructions", work, settings=settings.instructions, inputs=inputs, outputs=[INSTRUCTION_MANIFEST, "parquet_ready/instructions/"])

def contents(store): return {k: store.read(k) for k in store.list("parquet_ready/instructions/")}

def test_files_counts_and_quarantine(workspace, capsys):
    store, source = workspace
    said = []
    entry, skipped = run(store, source, said.append)
    c = entry["counts"]
    assert not skipped and c["read"] == 413 == c["written"] + c["left_out"] and c["kind_preference"] and c["kind_scored"] and c["kind_instruction"] and c["kind_conversation"]
    assert c["reasons"]["broken_json"] == 1 and c["reasons"]["invalid_utf8"] == 1 and c["reasons"]["not_an_object"] == 1 and "left out" in said[-1]
    keys = store.list("parquet_ready/instructions/")
    assert {k.rpartition("/")[2] for k in keys if "/sft/" in k} == {"a.parquet", *(f"{n}.parquet" for n in output_names(["a.jsonl", "b/c.jsonl.gz", "b-c.jsonl.zst"]).values() if n != "a")}
    bad = [json.loads(l) for k in keys if "quarantine" in k for l in store.read_text(k).splitlines()]
    assert len(bad) == c["left_out"] and all(set(b) >= {"file", "line", "reason", "raw"} for b in bad)
    lines = (source/"a.jsonl").read_bytes().split(b"\n")
    for b in (b for b in bad if b["file"] == "a.jsonl" and b["reason"] == "empty_response"): assert json.loads(lines[b["line"] - 1])["response"] == ""
    manifest = json.loads(store.read(INSTRUCTION_MANIFEST))
    assert sum(n for _, _, n, _ in manifest["licenses"]) == c["written"] and any(l == "cc0-1.0" for _, l, *_ in manifest["licenses"])
    assert manifest["sections"]["sft"]["rows"] == c["kind_instruction"] + c["kind_conversation"] and store.read_text("parquet_ready/instructions/chat_template.jinja") == load_tokenizer(str(store.fetch("tokenizer"))).chat_template
    assert run(store, source)[1]  # nothing changed: skipped

def test_resumed_and_repeated_runs_give_the_same_bytes(workspace, tmp_path):
    store, source = workspace
    run(store, source)
    whole = contents(store)
    for stop in (1, 2):
        other = open_store(tmp_path/f"other{stop}")
        with other.output("tokenizer") as path: save_tokenizer(bpe_tokenizer(), path)
        with pytest.raises(KeyboardInterrupt): run(other, source, stop=stop)
        assert not other.exists(INSTRUCTION_MANIFEST) and len([k for k in other.list("parquet_ready/") if "/sft/" in k]) == stop
        before = {k: other.stat(k) for k in other.list("parquet_ready/")}
        run(other, source)
        assert contents(other) == whole and all(other.stat(k) == s for k, s in before.items())  # finished files were not made again

def test_an_error_leaves_no_half_file(workspace, monkeypatch):
    store, source = workspace
    real, n = I.rows_of, [0]
    def failing(*a, **k):
        n[0] += 1
        if n[0] > 1: raise OSError("disk")
        return real(*a, **k)
    monkeypatch.setattr(I, "rows_of", failing); monkeypatch.setattr(I, "record_batches", lambda items: ([i] for i in items))
    with pytest.raises(OSError): run(store, source)
    store.clean()
    assert store.list("parquet_ready/") == []

def test_outputs_of_older_inputs_go(workspace):
    store, source = workspace
    run(store, source)
    (source/"a.jsonl").unlink()
    entry, _ = run(store, source)
    assert entry["counts"]["read"] == 110 and not [k for k in store.list("parquet_ready/instructions/") if "/a." in k]
    with pytest.raises(UserError, match="no .jsonl"): instruction_inputs(str(source/"notes.txt"))

def test_template_and_tokenizer_are_checked_before_any_file(workspace, tmp_path):
    store, source = workspace
    (tmp_path/"bad.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(UserError, match="chat template"): run(store, source, chat_template=str(tmp_path/"bad.jinja"))
    assert store.list("parquet_ready/") == []
    said = []
    (tmp_path/"gemma.jinja").write_text(GEMMA)
    counts = run(store, source, said.append, chat_template=str(tmp_path/"gemma.jinja"), system="짧게.")[0]["counts"]
    assert "does not take a system prompt" in said[0] and counts["written"] == 0 and counts["reasons"]["template"]

def test_every_reader_sees_the_same_rows(workspace, tmp_path):
    import datasets
    store, source = workspace
    run(store, source)
    paths = instruction_files(store)
    table = pq.read_table(paths[0])
    frame = pd.read_parquet(paths[0])
    assert not frame.drop(columns="score").isna().any().any() and frame.score.isna().all() and list(frame.columns) == I.INSTRUCTION_SCHEMA.names
    sql = duckdb.sql(f"SELECT kind, count(*) n, sum(len(tokens)) t, sum(length) l, sum(len(list_filter(labels, lambda x: x <> -100))) k FROM '{paths[0]}' GROUP BY ALL").df()
    assert (sql.t == sql.l).all() and sql.n.sum() == len(frame)
    ds = datasets.load_dataset("parquet", data_files=[str(p) for p in paths], split="train", cache_dir=str(tmp_path/"cache"))
    rows = InstructionRows(paths)
    assert len(ds) == len(rows)
    for i in (0, 5, len(rows) - 1):
        assert ds[i]["tokens"] == rows[i]["input_ids"].tolist() and ds[i]["labels"] == rows[i]["labels"].tolist()
    tokens, labels = TokenPages(paths), TokenPages(paths, column="labels")
    assert len(tokens) == len(labels) == sum(map(len, ds["tokens"]))
    a, b = tokens.take([0], len(tokens))[0], labels.take([0], len(labels))[0]
    assert np.array_equal(a[b != -100], b[b != -100]) and all(f.way == "pages" for f in tokens.files + labels.files)

def test_rows_in_batches_with_workers(workspace, tokenizer):
    store, source = workspace
    run(store, source)
    rows = InstructionRows(instruction_files(store))
    pad = lambda r: collate(r, tokenizer.pad_token_id, multiple=8)
    batches = [list(torch.utils.data.DataLoader(rows, batch_size=16, collate_fn=pad, num_workers=w)) for w in (0, 2)]
    for a, b in zip(*batches): assert all(torch.equal(a[k], b[k]) for k in a)
    first = batches[0][0]
    assert first["input_ids"].shape[1] % 8 == 0 and (first["labels"][first["attention_mask"] == 0] == -100).all() and (first["input_ids"][first["attention_mask"] == 0] == tokenizer.pad_token_id).all()
    assert torch.equal(rows[-1]["input_ids"], rows[len(rows) - 1]["input_ids"])
    with pytest.raises(IndexError): rows[len(rows)]
    pair = collate([InstructionRows(instruction_files(store, "preference"))[i] for i in range(4)], 1)
    assert pair["rejected_input_ids"].shape == pair["rejected_labels"].shape and not torch.equal(pair["input_ids"][0], pair["rejected_input_ids"][0])
    n = int((pair["labels"][0] != -100).nonzero()[0])
    assert torch.equal(pair["input_ids"][0, :n], pair["rejected_input_ids"][0, :n])  # both answer the same prompt
    scored = collate([InstructionRows(instruction_files(store, "scored"))[i] for i in range(3)], 1)
    assert scored["score"].dtype == torch.float32 and scored["score"].shape == (3,)

def test_loss_is_that_of_the_answers(workspace):
    "A model with labels of -100 sums over answer tokens only: equal to masking by hand."
    from transformers import LlamaConfig, LlamaForCausalLM
    store, source = workspace
    run(store, source)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=600, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)).eval()
    batch = collate([InstructionRows(instruction_files(store))[i] for i in range(4)], 1)
    with torch.no_grad(): out = model(**batch)
    logp = torch.log_softmax(out.logits[:, :-1].float(), -1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    assert torch.isclose(out.loss, -logp[batch["labels"][:, 1:] != -100].mean(), atol=1e-5)

def test_a_model_trained_on_the_rows_answers_and_stops(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM
    pairs = [("수도는?", "서울이다."), ("인구는?", "약 940만 명이다.\n\n끝"), ("법원은?", "기각하였다.")]
    rows = [row for row, _ in rows_of([{"prompt": q, "response": a} for q, a in pairs], Renderer_of(tokenizer), 100)]
    batch = collate([{"input_ids": torch.from_numpy(r["tokens"].astype(np.int64)), "labels": torch.from_numpy(r["labels"].astype(np.int64))} for r in rows], tokenizer.pad_token_id)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, eos_token_id=0, pad_token_id=1, bos_token_id=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80): loss = model(**batch).loss; optimizer.zero_grad(); loss.backward(); optimizer.step()
    for q, a in pairs:
        ids = tokenizer.apply_chat_template([U(q)], add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, max_new_tokens=40, do_sample=False, eos_token_id=tokenizer.convert_tokens_to_ids("<|end|>"))
        assert tokenizer.decode(out[0, ids["input_ids"].shape[1]:]) == a + "<|end|>"

def test_inference_uses_the_template_of_training(workspace):
    store, source = workspace
    run(store, source)
    served = load_tokenizer(str(store.fetch("tokenizer")))
    messages = [recognise(r).messages for r in made_records(20) if "instruction" in r or "messages" in r]
    assert check_inference(served, instruction_files(store), messages) == len(messages)
    served.chat_template = CHATML
    with pytest.raises(UserError, match="another chat template"): check_inference(served, instruction_files(store))
    other = as_pretrained(train_bpe(SENTENCES * 3, 300))
    with pytest.raises(UserError, match="another tokenizer"): check_inference(other, instruction_files(store))

def test_damage_is_found(workspace):
    store, source = workspace
    run(store, source)
    path = instruction_files(store)[0]
    data = bytearray(path.read_bytes())
    at = int(TokenFile(path, "labels").pages.at[0]) + 40
    data[at] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="checksum|page"): TokenPages([path], column="labels", check=True)

def test_on_s3(s3, tmp_path, tokenizer):
    store = open_store(s3.uri + "/ws")
    with store.output("tokenizer") as path: save_tokenizer(bpe_tokenizer(), path)
    source = open_store(s3.uri + "/in")
    source.write("x/한글.jsonl", b"".join(dump_line(r) for r in made_records(40)))
    entry, _ = run(store, s3.uri + "/in")
    assert entry["counts"]["read"] == 40
    rows = InstructionRows(instruction_files(store))
    assert len(rows) == entry["counts"]["kind_instruction"] + entry["counts"]["kind_conversation"]

def test_real_text(corpus, tokenizer):
    "Questions and answers cut from real documents: every answer comes back exactly, every prompt is a prefix."
    r = Renderer_of(tokenizer)
    records = []
    for path in sorted(corpus.glob("small/*.jsonl")):
        with open(path, encoding="utf-8") as f:
            for line, _ in zip(f, range(40)):
                text = json.loads(line)["text"][:1500]
                head, _, rest = text.partition("\n")
                records.append({"prompt": head[:300] or "?", "response": rest or head, "source": path.stem})
    good = 0
    for record, row in zip(records, rows_of(records, r, 10_000)):
        if isinstance(row, BadRecord): assert row.reason in ("empty_response", "empty_prompt", "control_token"); continue
        assert learned(tokenizer, row[0]["labels"]) == record["response"] + "<|end|>"
        assert tokenizer.decode(row[0]["tokens"][:-1]) == row[0]["text"]
        good += 1
    assert good > 0.9 * len(records)
