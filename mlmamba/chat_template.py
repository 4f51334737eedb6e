"""The prompt formats of mlmamba/conversation.py as Jinja templates, for `processor.apply_chat_template`.

It renders a chat as `render` renders its turns, so that training and every server see the same tokens
(tests/unit/mlmamba/test_chat_template.py). What the format has no place for is an error, as in `check_turns`: roles out
of order, empty questions, images of the assistant, tools. As in the HTTP server, system messages are one, or become the
first paragraphs of the first question where the format has none, and a message of several texts has one line for each.

The template marks answers as `generation`, so `return_assistant_tokens_mask=True` gives the positions that have labels.
"""

from mlmamba.conversation import ML_MAMBA, ChatFormat


def template_of(chat: ChatFormat) -> str:
    """The Jinja template of a format."""
    text = _TEMPLATE
    for name, mark in (("SYSTEM", chat.system), ("USER", chat.user), ("ASSISTANT", chat.assistant)):
        text = text.replace(name, "none" if mark is None else "'" + mark.replace("\n", "\\n") + "'")
    return text


_TEMPLATE = r"""
{%- macro clean(text) -%}
  {%- set rest = namespace(text=text) -%}
  {%- for _ in range(100) if '<image>' in rest.text -%}
    {%- set rest.text = rest.text | replace('<image>', '') -%}
  {%- endfor -%}
  {%- if '<image>' in rest.text -%}
    {{- raise_exception('a message holds <image> within <image>, over 100 deep') -}}
  {%- endif -%}
  {{- rest.text | trim -}}
{%- endmacro -%}

{%- if tools is defined and tools -%}
  {{- raise_exception('tools were given, which the prompt format has no place for') -}}
{%- endif -%}
{%- if not messages -%}
  {{- raise_exception('the conversation has no turns') -}}
{%- endif -%}
{%- set chat = namespace(turn=0, preface='') -%}

{%- for message in messages -%}
  {%- set role = message['role'] -%}
  {%- set content = namespace(text='', images=0) -%}
  {%- if message['content'] is string -%}
    {%- set content.text = message['content'] | trim -%}
  {%- else -%}
    {%- for part in message['content'] or [] -%}
      {%- if part['type'] == 'text' -%}
        {%- if part['text'] -%}
          {%- set content.text = content.text ~ ('\n' if content.text else '') ~ part['text'] -%}
        {%- endif -%}
      {%- elif part['type'] in ['image', 'image_url'] -%}
        {%- set content.images = content.images + 1 -%}
      {%- else -%}
        {{- raise_exception('a message holds a part of type ' ~ part['type'] ~ ', expected text or image') -}}
      {%- endif -%}
    {%- endfor -%}
    {%- set content.text = content.text | trim -%}
  {%- endif -%}
  {%- if content.images and role != 'user' -%}
    {{- raise_exception('a message of the ' ~ role ~ ' shows images; only users show images') -}}
  {%- endif -%}

  {%- if role in ['system', 'developer'] and chat.turn == 0 -%}
    {%- set chat.preface = chat.preface ~ content.text ~ ('\n\n' if content.text else '') -%}
  {%- else -%}
    {%- set expected = 'assistant' if chat.turn % 2 else 'user' -%}
    {%- if role != expected -%}
      {{- raise_exception(
        'turn ' ~ chat.turn ~ ' has role ' ~ role ~ ', expected ' ~ expected ~ ': user and assistant alternate'
      ) -}}
    {%- endif -%}
    {%- if role == 'user' and not content.images and not clean(content.text) -%}
      {{- raise_exception('turn ' ~ chat.turn ~ ' (' ~ role ~ ') is empty') -}}
    {%- endif -%}
    {%- if role == 'user' -%}
      {{- '\n' if chat.turn else '' -}}
      {{- '<image>' * content.images -}}
      {%- if SYSTEM and clean(chat.preface) -%}
        {{- SYSTEM ~ clean(chat.preface) ~ eos_token ~ '\n' -}}
        {%- set chat.preface = '' -%}
      {%- endif -%}
      {{- USER ~ clean(chat.preface ~ content.text) ~ eos_token ~ '\n' -}}
      {%- set chat.preface = '' -%}
    {%- else -%}
      {{- ASSISTANT -}}
      {%- generation -%}
        {{- clean(content.text) ~ eos_token -}}
      {%- endgeneration -%}
    {%- endif -%}
    {%- set chat.turn = chat.turn + 1 -%}
  {%- endif -%}
{%- endfor -%}

{%- if not chat.turn -%}
  {{- raise_exception('the conversation has no turn of the user') -}}
{%- endif -%}
{%- if add_generation_prompt -%}
  {%- if chat.turn % 2 == 0 -%}
    {{- raise_exception("the last turn is the assistant's; a prompt ends with a user turn") -}}
  {%- endif -%}
  {{- ASSISTANT -}}
{%- endif -%}
""".strip()

CHAT_TEMPLATE = template_of(ML_MAMBA)
