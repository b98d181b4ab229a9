"""Chat templates in the styles of the families in use, and conversations to render with them."""

from __future__ import annotations

CHATML = (
    "{%- for message in messages %}\n"
    "    {%- if loop.first and message['role'] != 'system' %}\n"
    "        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}\n"
    "    {%- endif %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}\n"
)

LLAMA3 = (
    "{{- bos_token }}\n"
    "{%- set date_string = date_string if date_string is defined else '26 Jul 2024' %}\n"
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {%- set system_message = messages[0]['content']|trim %}\n"
    "    {%- set messages = messages[1:] %}\n"
    "{%- else %}\n"
    "    {%- set system_message = '' %}\n"
    "{%- endif %}\n"
    "<|start_header_id|>system<|end_header_id|>\n\n"
    "Today Date: {{ date_string }}\n\n{{ system_message }}<|eot_id|>\n"
    "{%- for message in messages %}\n"
    "    {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' ~ message.content | trim }}<|eot_id|>\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
    "{%- endif %}\n"
)

MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
    "{%- set rest = messages[1:] %}\n"
    "{%- else %}{%- set rest = messages %}{%- endif %}\n"
    "{{- bos_token }}\n"
    "{%- for message in rest %}\n"
    "    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\n"
    "        {{- raise_exception('Roles must alternate user/assistant') }}\n"
    "    {%- endif %}\n"
    "    {%- if message['role'] == 'user' %}\n"
    "        {%- if loop.last and system is defined %}\n"
    "            {{- '[INST] ' + system + '\\n\\n' + message['content'] + '[/INST]' }}\n"
    "        {%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}\n"
    "    {%- else %}{{- ' ' + message['content']|trim + eos_token }}{%- endif %}\n"
    "{%- endfor %}"
)

THINKING = (
    "{% macro turn(role, text) %}<|im_start|>{{ role }}\n{{ text }}<|im_end|>\n{% endmacro %}\n"
    "{%- set ns = namespace(last=-1) %}\n"
    "{%- for message in messages[::-1] %}\n"
    "    {%- set index = messages | length - 1 - loop.index0 %}\n"
    "    {%- if ns.last < 0 and message.role == 'user' %}{% set ns.last = index %}{% continue %}{% endif %}\n"
    "{%- endfor %}\n"
    "{%- for message in messages %}\n"
    "    {%- set content = message.content.split('</think>')[-1].lstrip('\\n') if '</think>' in message.content"
    " else message.content %}\n"
    "    {{- turn(message.role, content) }}\n"
    "    {%- if loop.index0 == ns.last %}"
    "{{- message | tojson(indent=2) }} {{ {'b': 1, 'a': '<&>'} | tojson }}{% endif %}\n"
    "{%- endfor %}\n"
    "{%- for key, value in messages[0] | items %}"
    "{{ key | upper }}={{ value | replace('a', 'b') | indent(2) }};{% endfor %}\n"
    "{% generation %}{{ messages | map(attribute='role') | join(', ') }}{% endgeneration %}\n"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "thinking": THINKING}

CONVERSATIONS = {
    "one turn": [{"role": "user", "content": "Write f.\n\tx = 1  "}],
    "system prompt": [
        {"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "h\u00e9 \U0001f600 <b>"}],
    "several turns": [
        {"role": "system", "content": "S"}, {"role": "user", "content": "a\nb\n\nc"},
        {"role": "assistant", "content": "<think>no</think>\n\nanswer "}, {"role": "user", "content": "again"}],
}  # fmt: skip
