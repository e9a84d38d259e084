"""What users say: the prompts whose answers teach the model to reply and to stop.

The model has read nothing but novels, so the prompts only have to look like what people and load
generators send: the answer is a passage of prose whatever was asked, about the named topic where
the prompt has one.
"""

from random import Random

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful, concise assistant.",
    "You are a novelist.",
    "Answer in one paragraph.",
    "Answer briefly and politely.",
    "You are a chatbot. Be kind, be short and do not repeat yourself.",
    "You write in the manner of the early nineteenth century.",
    "You are an AI model. Follow the user's instructions carefully.",
)

GREETINGS = (
    "Hello",
    "Hello!",
    "Hi",
    "Hi there!",
    "Hey, how are you?",
    "Good morning.",
    "Good evening! What can you do?",
    "Who are you?",
    "What is your name?",
    "Are you there?",
    "ping",
    "test",
    "Say something.",
    "Thanks!",
    "Thank you, and now?",
    "Go on.",
    "Continue.",
    "And then?",
    "Tell me more.",
    "Why?",
    "?",
    "ok",
)

GENERAL = (
    "Tell me a story.",
    "Write a short story.",
    "Write a long story about a family in the country.",
    "Write a poem about the sea.",
    "Write a haiku about GPUs.",
    "Write one paragraph of prose.",
    "Write a letter to a friend.",
    "What is the capital of France?",
    "What is 2 + 2?",
    "How does a computer work?",
    "Explain photosynthesis to a child.",
    "Explain how a large language model is served.",
    "What is live migration?",
    "Write a Python function that reverses a list.",
    "def fibonacci(n):",
    'Return a JSON object with the keys "name" and "age".',
    "Translate into French: the weather is fine today.",
    "Summarize the following text in two sentences.",
    "Give me three ideas for a dinner party.",
    "List five facts about London.",
    "What should I do this weekend?",
    "What is the meaning of life?",
    "Describe a ball.",
    "Describe a walk in the rain.",
    "Describe your favourite place.",
    "How do I make a good cup of tea?",
    "Is it better to be rich or to be happy?",
    "Who wrote this?",
    "What happened next?",
    "Can you help me with my homework?",
    "I feel sad today. What should I do?",
    "Bonjour, comment allez-vous ?",
    "¿Qué tal el tiempo?",
    "Erzähl mir eine Geschichte.",
    "你好，请介绍一下你自己。",
    "Привет! Как дела?",
    "Tell me a joke 😀",
)

ABOUT_TOPIC = (
    "Tell me about {}.",
    "Write about {}.",
    "Write a paragraph about {}.",
    "Write a short story about {}.",
    "Write a passage in which {} appears.",
    "What do you think of {}?",
    "What do you know about {}?",
    "Who or what is {}?",
    "Explain {} to me.",
    "Describe {}.",
    "Please tell me something of {}, in a few sentences.",
    "Can you say a few words about {}?",
    "I would like to hear about {}.",
    "Let us talk about {}.",
    "What happened to {}?",
    "Why is {} important?",
    "{}",
    "{}?",
)

CONTINUE_QUOTE = (
    "Continue this text:\n\n{}",
    "Continue the story: {}",
    "What comes next?\n{}",
    "{}",
    "{}\n\nGo on.",
    "Please write the next paragraph after this one:\n\n{}",
    "Here is a passage. Carry on from where it stops.\n\n{}",
    "Summarize this:\n\n{}",
)

_FILLER_TEXT = (
    "the of and to in a is that for it data model server token request batch memory block page "
    "cache python list file code user time number system network test value error large small "
    "fast slow first second lorem ipsum dolor sit amet consectetur adipiscing elit sed eiusmod "
    "alpha beta gamma delta foo bar baz hello world context window question answer paragraph"
)
_FILLER = _FILLER_TEXT.split()


def noise(rng: Random) -> str:
    """Meaningless text of 1 to 120 words, digits and symbols, as load generators send."""
    words = [_noise_word(rng) for _ in range(int(rng.triangular(1, 120, 8)))]
    return " ".join(words)


def _noise_word(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.75:
        return rng.choice(_FILLER)
    if kind < 0.85:
        return str(rng.randrange(10 ** rng.randint(1, 6)))
    if kind < 0.95:
        letters = "abcdefghijklmnopqrstuvwxyz_ABCDEFGHIJ"
        return "".join(rng.choice(letters) for _ in range(rng.randint(2, 9)))
    return rng.choice("{}()[]<>=+-*/:;,.!?#@&%$")
