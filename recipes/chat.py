"""Try it: chat with a model or an adapter; with two, say which reply was better.

    accelerate launch recipes/chat.py
    accelerate launch recipes/chat.py --models outputs/ppo
    accelerate launch recipes/chat.py --models sft=outputs/sft ppo=outputs/ppo --page true
    accelerate launch recipes/reward.py --dataset_name outputs/chat/train.jsonl --output_dir outputs/chat-reward

Without arguments it reads recipes/configs/chat.yaml: the starter, in the terminal. `/new` starts over. An empty line,
`/quit` or Ctrl-D ends. `--page true` opens a page instead. Only this machine can reach it, unless --server_name says
otherwise.

Two models reply as A and B, in an order drawn anew each turn. Your answer reveals which model was which, and the
conversation continues with the better reply. Answers go into votes.jsonl and tasks.jsonl of --output_dir, in the voting
page's format; train.jsonl there has the preference pairs. Skipped replies are not kept. --output_dir may be the folder
of `recipes/collect.py --labeler human`: your votes are then added to those.
"""

from rlhf.run.arguments import answer_early, parse

if __name__ == "__main__":  # before the imports below, which take seconds
    answer_early(__file__)

from dataclasses import dataclass, field

from trl import ModelConfig

from rlhf.errors import report_errors
from rlhf.feedback.chat import Chat
from rlhf.feedback.chat_terminal import chat_in_terminal
from rlhf.feedback.chat_votes import ChatVotes
from rlhf.feedback.speakers import load_speakers, resolve_speakers
from rlhf.models.sources import refuse_single_model
from rlhf.models.tokenizers import load_tokenizer
from rlhf.run.processes import need_one_process
from rlhf.run.ranges import Port, PositiveInt, Seed, Temperature


@dataclass
class ChatArguments:
    """Who replies, how, and where answers go."""

    models: list[str] = field(
        default_factory=lambda: ["starter"],
        metadata={"help": "One model or two: Hub ids, folders, or name=model."},
    )
    page: bool = field(default=False, metadata={"help": "Chat on a page instead of in the terminal."})
    server_name: str = field(default="127.0.0.1", metadata={"help": "Address of the page."})
    server_port: Port = field(default=7860, metadata={"help": "Port of the page."})
    max_new_tokens: PositiveInt = field(default=128, metadata={"help": "Longest reply, in tokens."})
    temperature: Temperature = field(default=0.7, metadata={"help": "Sampling temperature; training samples at 1."})
    seed: Seed = field(default=42, metadata={"help": "Seed of sampling and of the order of A and B."})
    labeler_name: str = field(default="me", metadata={"help": "Your name, kept with your answers."})
    output_dir: str = field(default="outputs/chat", metadata={"help": "Folder for the answers about two models."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a Hub model brings along."})


def main() -> None:
    # Arguments
    args, model_args = parse(__file__, ChatArguments, ModelConfig)
    need_one_process(__file__)
    refuse_single_model(model_args)
    sources = resolve_speakers(args.models, args.trust_remote_code)
    votes = ChatVotes(args.output_dir, args.labeler_name) if len(sources) > 1 else None
    if args.page:
        from rlhf.feedback.chat_page import chat_on_page  # Gradio takes seconds to import
        from rlhf.feedback.serving import need_free_port

        need_free_port(args.server_name, args.server_port)

    # Tokenizers
    tokenizers = {name: load_tokenizer(source) for name, source in sources.items()}

    # Models
    speakers = load_speakers(
        sources,
        tokenizers,
        model_args,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
    )

    # Chat
    chat = Chat(speakers, votes, max_new_tokens=args.max_new_tokens, seed=args.seed)
    if args.page:
        chat_on_page(chat, args.server_name, args.server_port)
    else:
        chat_in_terminal(chat)


if __name__ == "__main__":
    with report_errors():
        main()
