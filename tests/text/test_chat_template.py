# ruff: noqa: E501 - published templates have long lines
"""Chat templates: token ids equal transformers' `apply_chat_template`; malformed messages are refused."""

from pathlib import Path
from typing import Any

import pytest

from tritium.errors import CheckpointError, RequestError
from tritium.testing import tiny_tokenizers
from tritium.text.chat_template import ChatTemplate
from tritium.text.tokenizer import Tokenizer

TEMPLATES = {
    "llama 2": """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}""",
    "llama 3": """{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""",
    "llama 3.1 with tools": """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "chatml": """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "qwen 2.5 with tools": """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are a helpful assistant.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n\\nYou are provided with function signatures within <tools></tools> XML tags:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "mistral": """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" and message.content is defined %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
""",
    "zephyr": """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "gemma": """{{ bos_token }}{% for message in messages if message['role'] != 'system' %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + (message['content'] or '') | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}""",
    "content parts, macros and break": """{% macro render(content) -%}
{% if content is string %}{{ content }}{% else %}{% for part in content %}{% if part.type == 'text' %}{{ part.text }}{% else %}{{ '<' ~ part.type ~ '>' }}{% endif %}{% endfor %}{% endif %}
{%- endmacro %}
{% for message in messages -%}
{% if message.role == 'stop' %}{% break %}{% elif message.role == 'note' %}{% continue %}{% endif %}
{% generation %}{{ message.role | upper }}: {{ render(message.content) }}{% endgeneration %}

{% set outer = loop.index %}
{% endfor -%}
{% set block %}{{ messages | map(attribute='role') | unique | join(', ') }}{% endset %}
[{{ block | indent(2) }}] {{ '%s-%03d' | format('n', messages | length) }} {{ "{:>4}".format(7) }} {{ dict(a=1) | tojson }} {{ messages[-1].reasoning_content is defined }}""",
}

USER = {"role": "user", "content": "What is the weather in Paris?  "}
ASSISTANT = {"role": "assistant", "content": " 12 degrees <b>&amp;</b> 'rain' "}
SYSTEM = {"role": "system", "content": "You are terse. Ä🙂"}
CALL = {"function": {"name": "weather", "arguments": {"city": "Paris", "days": 123456789, "é": [1.5, None, True]}}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the <weather>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 99999999}}},
        },
    }
]
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "one question": ([USER], {}),
    "system and two turns": ([SYSTEM, USER, ASSISTANT, USER], {}),
    "no generation prompt": ([USER, ASSISTANT], {"add_generation_prompt": False}),
    "ends with an answer": ([SYSTEM, USER, ASSISTANT, USER, ASSISTANT], {}),
    "a None value": ([{**USER, "tool_calls": None}], {}),
    "tools": ([SYSTEM, USER], {"tools": TOOLS}),
    "reasoning under its older name": ([USER, {**ASSISTANT, "reasoning": "hm"}], {}),
    "a variable for the template": ([USER], {"date_string": "1 May 2025"}),
}


@pytest.fixture(scope="module", params=["Llama-3 style", "SentencePiece BPE with byte fallback"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizers.write_directory(
        tmp_path_factory.mktemp("chat"),
        tiny_tokenizers.KINDS[request.param](),
        tiny_tokenizers.NAMED_TOKENS[request.param],
    )


def load(directory: Path):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory)


def as_of_today(theirs: Any, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, with what release 5.23 does to them before it renders them done where an older one does not."""
    probe = [{"role": "user", "content": "", "x": None, "reasoning": "hm"}]
    template = "{{ messages[0].x is defined }} {{ messages[0].reasoning_content }}"
    keeps_none, reasoning = theirs.apply_chat_template(probe, chat_template=template, tokenize=False).split(" ")
    if keeps_none == "True":
        messages = [{name: value for name, value in one.items() if value is not None} for one in messages]
    if reasoning != "hm":
        messages = [one | {"reasoning_content": one["reasoning"]} if "reasoning" in one else one for one in messages]
    return messages


def assert_equal_ids(ours: Tokenizer, theirs: Any, messages: list[dict[str, Any]], options: dict[str, Any]) -> None:
    options = {"add_generation_prompt": True, **options}
    expected = theirs.apply_chat_template(as_of_today(theirs, messages), return_dict=False, **options)
    assert ours.encode_chat(messages, **options) == expected, theirs.decode(expected)


@pytest.mark.parametrize("name", TEMPLATES)
def test_token_ids_equal_apply_chat_template(directory: Path, name: str) -> None:
    (directory / "chat_template.jinja").write_text(TEMPLATES[name], encoding="utf-8")
    ours, theirs = Tokenizer.from_directory(directory), load(directory)
    for messages, options in CONVERSATIONS.values():
        assert_equal_ids(ours, theirs, messages, options)


@pytest.mark.parametrize("name", ["qwen 2.5 with tools", "llama 3.1 with tools"])
def test_tool_calls_and_their_results_equal_apply_chat_template(directory: Path, name: str) -> None:
    (directory / "chat_template.jinja").write_text(TEMPLATES[name], encoding="utf-8")
    messages = [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": '{"t": 12}'}]
    assert_equal_ids(Tokenizer.from_directory(directory), load(directory), messages, {"tools": TOOLS})


def test_parts_of_content_equal_apply_chat_template(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text(TEMPLATES["content parts, macros and break"], encoding="utf-8")
    parts = [{"type": "text", "text": "see"}, {"type": "image", "url": "x"}]
    messages = [{"role": "user", "content": parts}, {"role": "note", "content": "-"}, USER, {"role": "stop"}, USER]
    assert_equal_ids(Tokenizer.from_directory(directory), load(directory), messages, {})


def test_the_demo_checkpoints_template_equals_apply_chat_template() -> None:
    demo = Path(__file__).parents[2] / "examples" / "demo_model"
    for messages, options in CONVERSATIONS.values():
        assert_equal_ids(Tokenizer.from_directory(demo), load(demo), messages, options)


def test_a_template_in_tokenizer_config_is_found_and_a_file_goes_before_it(tmp_path: Path) -> None:
    config = {"chat_template": "config {{ messages[0].content }}"}
    tiny_tokenizers.write_directory(tmp_path, tiny_tokenizers.byte_level_bpe(), config)
    assert Tokenizer.from_directory(tmp_path).render_chat([{"role": "user", "content": "x"}]) == "config x"
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    assert Tokenizer.from_directory(tmp_path).render_chat([{"role": "user", "content": "x"}]) == "file x"


def test_named_templates_are_chosen_by_name_and_by_tools(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    tiny_tokenizers.write_directory(tmp_path, tiny_tokenizers.byte_level_bpe(), {"chat_template": templates})
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.render_chat([USER]) == "plain"
    assert tokenizer.render_chat([USER], tools=TOOLS) == "tools"
    assert tokenizer.render_chat([USER], template="tool_use") == "tools"
    with pytest.raises(RequestError, match="no chat template named 'rag'; this model has default, tool_use"):
        tokenizer.render_chat([USER], template="rag")


@pytest.mark.parametrize("template", [3, [{"name": "x"}], ["text"], {"name": 1, "template": "x"}])
def test_a_malformed_template_entry_is_refused(tmp_path: Path, template: object) -> None:
    tiny_tokenizers.write_directory(tmp_path, tiny_tokenizers.byte_level_bpe(), {"chat_template": template})
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template must be text or a list"):
        Tokenizer.from_directory(tmp_path)


def test_a_model_without_a_template_says_what_to_use_instead(tmp_path: Path) -> None:
    tiny_tokenizers.write_directory(tmp_path, tiny_tokenizers.byte_level_bpe(), {})
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match=r"no chat template; use generate\(\)"):
        tokenizer.render_chat([USER])


def test_a_syntax_error_names_its_line() -> None:
    with pytest.raises(CheckpointError, match="chat template 'default', line 2: "):
        ChatTemplate("ok\n{% if %}").render([USER])


def test_what_a_template_raises_reaches_the_caller() -> None:
    with pytest.raises(RequestError, match="refuses this conversation: roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render([USER])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must hold at least one message"),
        ("hello", "messages must be a list, not str"),
        ({"role": "user"}, "messages must be a list, not dict"),
        (["hello"], r"messages\[0\] must be an object with a role, not 'hello'"),
        ([USER, {"content": "x"}], r"messages\[1\] needs a role \(text\), not None"),
        ([{"role": 3}], r"messages\[0\] needs a role \(text\), not 3"),
        ([{"role": "user", "content": object()}], r"messages\[0\]\.content holds a object"),
    ],
)
def test_malformed_messages_are_refused_with_their_place(messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ChatTemplate("{{ messages[0].content }}").render(messages)


def test_messages_nested_without_end_are_refused() -> None:
    content: list[Any] = []
    for _ in range(1000):
        content = [content]
    with pytest.raises(RequestError, match="nested more than 32 levels"):
        ChatTemplate("{{ messages }}").render([{"role": "user", "content": content}])


def test_a_template_that_fails_on_a_message_is_a_request_error() -> None:
    with pytest.raises(RequestError, match="fails on this conversation: TypeError"):
        ChatTemplate("{{ 'a' + messages[0].content }}").render([{"role": "user", "content": 3}])


def test_a_long_conversation_stays_within_the_limits() -> None:
    messages = [USER if index % 2 == 0 else ASSISTANT for index in range(1000)]
    for name in ("qwen 2.5 with tools", "mistral", "llama 3"):
        assert len(ChatTemplate(TEMPLATES[name]).render(messages, bos_token="<s>", eos_token="</s>")) > 30_000
