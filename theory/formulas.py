"""Formulas as they are written in this repository, plain text in Unicode, set as MathML: browsers need no script for it.

What is read: ``x_i``, ``x_{i,k}``, ``e^{-s}``, ``T^½``, ``x²``, ``Aᵀ``, ``Ĥ``, ``Σ_r``, ``√(1 − x)``, ``|x|``, and in ASCII
``lambda_min``, ``sqrt(m)``, ``sum_j``, ``<=``, ``->``, ``H*``. Three letters are a word, two letters a product.
"""

import functools
import re
import unicodedata
from html import escape
from typing import NamedTuple

__all__ = ["display", "found_in", "in_line", "inline", "is_formula", "placed", "restored"]

_GREEK = "alpha α beta β gamma γ delta δ epsilon ε zeta ζ eta η theta θ kappa κ lambda λ mu μ nu ν xi ξ pi π rho ρ tau τ eps ε"
_SIGNS = (
    "sigma σ phi φ psi ψ omega ω Gamma Γ Delta Δ Theta Θ Lambda Λ Sigma Σ Phi Φ Omega Ω sum Σ prod Π sqrt √ infinity ∞"
)
_NAMES = dict(zip(f"{_GREEK} {_SIGNS}".split()[::2], f"{_GREEK} {_SIGNS}".split()[1::2], strict=True))
_LIMITS = {"max", "min", "sup", "inf", "lim", "argmin"}
_FUNCTIONS = _LIMITS | {
    "log",
    "exp",
    "softmax",
    "relu",
    "elu",
    "diag",
    "tr",
    "rank",
    "cos",
    "tanh",
    "dist",
    "cap",
    "op",
}
_SHORT_WORDS = {"is", "of", "as", "at", "in", "on", "or", "to", "by", "if", "op", "tr"}
_RELATIONS = {"=", "≤", "≥", "<", ">", "≈", "~", "≼", "≽", "→", "↦", "∈", ":=", "≠", "∼", "≪", "≫"}
_BINARY = {"+", "−", "·", "×", "∘", "⊗", "/", "±", "∗"}
_BEFORE_A_SIGN = {"open", "relation", "binary", "separator", "function", "big"}
_OPEN, _CLOSE, _SEPARATORS = {"(", "[", "⟨", "{"}, {")", "]", "⟩", "}"}, {",", ";", ":", "."}
_ASCII = {"<=": "≤", ">=": "≥", "->": "→", "-": "−", "*": "∗", "~": "∼", "µ": "μ", "′": "'"}
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ᵀ", "0123456789+−T", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_ACCENTS = {"\u0302": "^", "\u0304": "¯", "\u0303": "~", "\u0305": "¯"}
_LOWERCASE = "a-zα-ωℓ"

_COMMAND = re.compile(
    r"^(python|make|pip|certify|npx)\b|--\w|^_\w|\w\.(py|md|npz|npy|html|json)\b|\w\(…|\w=\w+\)$|runs/"
)


def is_formula(text: str) -> bool:
    """Return whether what is between backticks is a formula: ``w_r ∈ R^d``, ``F Z``; not ``kernels.predict``, ``--seed``."""
    if _COMMAND.search(text):
        return False
    if re.fullmatch(r"[\w./-]+", text, re.ASCII):
        return not re.match(r"[A-Za-z]{2}", text)
    return True


def found_in(prose: str) -> list[tuple[str, bool]]:
    """Return a line of text in parts, each with whether it is a formula: a run of words that are symbols, signs or relations.

    A run has a sure word, such as ``λ``, ``x_i`` or ``e^t``; letters and numbers count beside it if a sign connects them.
    """
    words = re.split(r"(\s+)", prose)
    kinds = ["space" if place % 2 else _word_kind(word) for place, word in enumerate(words)]
    parts: list[tuple[str, bool]] = []
    at = 0
    while at < len(words):
        end = at
        while end < len(words) and kinds[end] != "text" and (kinds[end] != "space" or words[end] == " "):
            end += 1
            if kinds[end - 1] != "space" and words[end - 1][-1] in ",;:." and _balanced("".join(words[at:end])):
                break
        while end > at and (
            kinds[end - 1] in {"space", "sign"} or words[end - 1] in _FUNCTIONS or not _balanced("".join(words[at:end]))
        ):
            end -= 1
        run = words[at:end]
        whole = "".join(run).rstrip(",;:.")
        sure = any(kinds[place] == "sure" for place in range(at, end)) or {"sign"} < set(kinds[at:end]) - {"space"}
        if run and sure and kinds[at] not in {"space", "sign"}:
            parts += [(whole, True), ("".join(run)[len(whole) :], False)]
            at = end
        else:
            parts.append((words[at], False))
            at += 1
    return [part for part in parts if part[0]]


_NO_FORMULA = re.compile(r"[`\ue000\"§∎#]|\*\*|^\*|\*$|\]\(|://|__|^\w\w+\.\w+|[A-Za-z]{3}(?![^_]*[)}])")
_SURE = re.compile(r"[α-ωΓΔΘΛΞΠΣΦΨΩℓ√∑∂∇∈≤≥≼≽∞²³⁰⁻ᵀ½^≈\u0304\u0302]|[A-Za-z]_[A-Za-z0-9{(]")
_SOFT = re.compile(r"[-−+/!]?(\d[\d.,·]*\d|\d|[A-Zb-z]|\d[a-z]|d[A-Z])?[-+/!]?")
_FUNCTION = re.compile(rf"(?<![A-Za-z])({'|'.join(sorted(_FUNCTIONS - {'op'}))})(?=[|(_{{\d]|$)")


def _word_kind(word: str) -> str:
    core = word.strip(",;:.")
    if core == "|" or re.fullmatch(r"\([ivx]+\)", core):
        return "text"  # a table's line, an item
    if core in _RELATIONS | _BINARY | {"<=", ">=", "->", "*", "-", "/"} - {"~"}:
        return "sign"
    if core not in {"sum", "prod", "infinity"}:
        core = re.sub(r"(?<![A-Za-z])[A-Za-z]+(?![A-Za-z])", lambda found: _NAMES.get(found[0], found[0]), core)
    core = _FUNCTION.sub("", core)
    if not core or core.endswith("-") or _NO_FORMULA.search(re.sub(r"_[a-z]+|[_^]?\{[^}]*\}", "", core)):
        return "soft" if word in {"log", "max", "min", "sup"} else "text"
    pieces = re.split(r"[()\[\]{}|<>⟨⟩‖,'*·=]+", core)
    if _SURE.search(core):
        return "sure"
    return "soft" if all(_SOFT.fullmatch(piece) for piece in pieces) else "text"


def _balanced(text: str) -> bool:
    depths = {"(": 0, "[": 0, "{": 0, "⟨": 0}
    for character in text:
        if character in depths:
            depths[character] += 1
        elif character in ")]}⟩":
            opening = "([{⟨"[")]}⟩".index(character)]
            depths[opening] -= 1
            if depths[opening] < 0:
                return False
    return not any(depths.values()) and text.count("|") % 2 == 0


def inline(text: str) -> str:
    """Return a formula in a line of text, as several ``<math>`` where a line may break: in front of a relation."""
    parts: list[list[_Piece]] = [[]]
    depth = 0
    for piece in _Reader(text).row():
        depth += (piece.kind == "open") - (piece.kind == "close")
        if piece.kind == "relation" and depth <= 0 and len(parts[-1]) > 1:
            if parts[-1][-1].kind == "space":
                parts[-1].pop()
            parts.append([])
        parts[-1].append(piece)
    return "<wbr>".join(f"<math>{_joined(part)}</math>" for part in parts)


def display(lines: list[str]) -> str:
    """Return lines of formulas as a block: columns where three spaces stand, equation numbers at the right."""
    rows = []
    for line in lines:
        body, number = line.rstrip(), ""
        if found := re.search(r"\s{3,}(\(\d+[^()]*\))$", body):
            body, number = body[: found.start()], found[1]
        indent = len(body) - len(body.lstrip())
        space = f'<mspace width="{indent / 3:.1f}em"></mspace>' if indent else ""
        formula = f'<math display="block">{space}{_joined(_Reader(body.strip()).row())}</math>'
        rows.append(f'<div>{formula}<span class="number">{escape(number)}</span></div>')
    return f'<div class="formula">{"".join(rows)}</div>'


def in_line(text: str) -> str:
    """Return a line of text as HTML, with the formulas that are found in it."""
    signs = {" <= ": " ≤ ", " >= ": " ≥ ", " -> ": " → "}
    plain = functools.reduce(lambda line, pair: line.replace(*pair), signs.items(), text)
    return "".join(inline(part) if is_formula else escape(part) for part, is_formula in found_in(plain))


def placed(markdown: str) -> tuple[str, list[str]]:
    """Return Markdown with a mark in the place of each formula, and the formulas, for :func:`restored`.

    Formulas are indented blocks, what is between backticks and is no code, and what :func:`found_in` finds. A mark is the
    formula's number between two characters of no language, which no reader of Markdown touches.
    """
    made: list[str] = []

    def mark(formula: str) -> str:
        made.append(formula)
        return f"\ue000{len(made) - 1}\ue001"

    def marked(line: str) -> str:
        parts = re.split(r"(`[^`]+`|\]\([^)]*\))", line)
        for place, part in enumerate(parts):
            if place % 2 == 0 and not line.startswith(("#", "|--")):
                parts[place] = "".join(mark(inline(text)) if is_math else text for text, is_math in found_in(part))
            elif part.startswith("`") and is_formula(part[1:-1]):
                parts[place] = mark(inline(part[1:-1]))
        return "".join(parts)

    markdown = re.sub(r"`[^`]+`", lambda span: span[0].replace("\n", " "), markdown)
    blocks = re.split(r"((?:^    .*\n(?:\s*\n(?=    ))?)+)", markdown, flags=re.MULTILINE)
    for place, block in enumerate(blocks):
        if place % 2:
            blocks[place] = mark(display([line[4:] for line in block.splitlines() if line.strip()])) + "\n"
        else:
            blocks[place] = "\n".join(marked(line) for line in block.split("\n"))
    return "".join(blocks), made


def restored(page: str, made: list[str]) -> str:
    """Return HTML with the formulas where their marks are; no line parts one from the point behind it."""

    def formula(found: re.Match[str]) -> str:
        *before, last = made[int(found[1])].split("<wbr>")
        return "<wbr>".join([*before, f'<span class="whole">{last}{found[2]}</span>' if found[2] else last])

    page = re.sub(r"<p>(\ue000\d+\ue001)</p>", r"\1", page)
    return re.sub(r"\ue000(\d+)\ue001([,.;:)]*)", formula, page)


class _Piece(NamedTuple):
    kind: str  # atom, big, word, function, relation, binary, open, close, separator, space
    xml: str


class _Reader:
    """A recursive descent over the characters of one formula."""

    def __init__(self, text: str) -> None:
        text = unicodedata.normalize("NFD", text).replace("=\u0338", "≠").replace(" . ", " · ")
        self.text, self.at = text, 0

    def row(self, until: str = "") -> list[_Piece]:
        pieces: list[_Piece] = []
        while self.at < len(self.text) and self.text[self.at] != until:
            pieces.append(self.scripted(pieces))
        self.at += bool(until)
        return pieces

    def scripted(self, before: list[_Piece]) -> _Piece:
        """Read a piece and what hangs on it, below and above."""
        piece = self.piece(before)
        below, above = "", ""
        while self.at < len(self.text):
            character = self.text[self.at]
            if character == "_":
                below += self.script()
            elif character == "^":
                above += self.script()
            elif character in _RAISED:
                above += self.raised(_RAISED)
            elif character in _LOWERED:
                below += self.raised(_LOWERED)
            elif character in "'′" and piece.kind != "space":
                self.at += 1
                above += "<mo>′</mo>"
            elif character == "*" and (piece.xml[4:5].isupper() or not re.match(r"\* *\w", self.text[self.at :])):
                self.at += 1
                above += "<mo>∗</mo>"
            else:
                break
        if not below + above:
            return piece
        under = piece.kind == "big"
        tag = {(True, False): "munder" if under else "msub", (False, True): "mover" if under else "msup"}.get(
            (bool(below), bool(above)), "munderover" if under else "msubsup"
        )
        inside = piece.xml + "".join(f"<mrow>{part}</mrow>" for part in (below, above) if part)
        return piece._replace(xml=f"<{tag}>{inside}</{tag}>")

    def raised(self, letters: dict[str, str]) -> str:
        run = ""
        while self.at < len(self.text) and self.text[self.at] in letters:
            run += letters[self.text[self.at]]
            self.at += 1
        return _joined(_Reader(run).row())

    def script(self) -> str:
        """Read what stands behind ``_`` or ``^``: a group in braces or parentheses, a run of letters, a number, or one sign."""
        self.at += 1
        rest = self.text[self.at :]
        if rest.startswith("{"):
            self.at += 1
            return _joined(self.row("}"))
        if rest.startswith("(") and not re.match(r"\([a-z]+\)|\([a-z],·\)", rest):
            return self.parenthesized()
        whole = r"\([a-z]+\)(,\([a-z]+\))*|\([a-z],·\),\([a-z],·\)|[−-]?(\d+|[A-Z]|½|T)"
        if found := re.match(whole, rest):
            run = found[0]
        elif found := re.match(rf"[{_LOWERCASE}]+", rest):
            run = found[0]
            follows = rest[len(run) :][:1]
            if follows and follows in "_" and len(run) > 1:
                run = run[:-1]  # x_rx_r is x_r x_r
        else:
            run = rest[:1]
        self.at += len(run)
        return _joined(_Reader(run).row())

    def piece(self, before: list[_Piece]) -> _Piece:
        rest = self.text[self.at :]
        if found := re.match(r"\s+", rest):
            self.at += len(found[0])
            return _Piece("space", found[0])
        if found := re.match(r"\d+(\.\d+)?", rest):
            self.at += len(found[0])
            return _Piece("atom", f"<mn>{found[0]}</mn>")
        if found := re.match(r"[A-Za-z]+", rest):
            return self.letters(found[0])
        if re.match(r"<[\w|(]", rest) and ">" in rest and not re.search(r"[\w)|]$", self.text[: self.at]):
            self.at += 1
            return _operator("⟨", before)
        if rest[0] == ">" and any("⟨" in piece.xml for piece in before) and re.search(r"[\w)|]$", self.text[: self.at]):
            self.at += 1
            return _operator("⟩", before)
        for written, sign in {**_ASCII, ":=": ":="}.items():
            if rest.startswith(written):
                self.at += len(written)
                return _operator(sign, before)
        self.at += 1
        if rest[0] == "√":
            return self.root()
        if rest[0] in "ΣΠ":
            return _Piece("big", f'<mo movablelimits="true">{"∑" if rest[0] == "Σ" else "∏"}</mo>')
        if rest[0].isalpha() or rest[0] in "∂∞½∅":
            tag = "mn" if rest[0] == "½" else "mi"
            return _Piece("atom", self.accented(f"<{tag}>{rest[0]}</{tag}>"))
        return _operator(rest[0], before)

    def letters(self, run: str) -> _Piece:
        if run in _NAMES:
            self.text = self.text[: self.at] + _NAMES[run] + self.text[self.at + len(run) :]
            return self.piece([])
        accent = self.text[self.at + len(run) :][:1] in _ACCENTS
        if (len(run) > 2 and not run.isupper() and not accent) or run in _SHORT_WORDS:
            self.at += len(run)
            if run in _FUNCTIONS:
                kind = "big" if run in _LIMITS else "function"
                return _Piece(kind, f'<mo movablelimits="true" lspace="0" rspace="0">{run}</mo>')
            return _Piece("word", f"<mtext>{run}</mtext>")
        self.at += 1
        return _Piece("atom", self.accented(f"<mi>{run[0]}</mi>"))

    def accented(self, xml: str) -> str:
        while self.at < len(self.text) and (accent := _ACCENTS.get(self.text[self.at])):
            self.at += 1
            xml = f'<mover accent="true">{xml}<mo stretchy="false">{accent}</mo></mover>'
        return xml

    def root(self) -> _Piece:
        """Read what a root is over: parentheses, which it makes needless, or one piece; ``λ_max(H)`` is one."""
        if self.text[self.at : self.at + 1] == "(":
            return _Piece("atom", f"<msqrt>{self.parenthesized()}</msqrt>")
        start = self.at
        inside = self.scripted([]).xml
        if self.text[self.at : self.at + 1] == "(" and self.text[start : self.at].endswith(("_max", "_min")):
            inside += f'<mo stretchy="false">(</mo>{self.parenthesized()}<mo stretchy="false">)</mo>'
        return _Piece("atom", f"<msqrt>{inside}</msqrt>")

    def parenthesized(self) -> str:
        depth, start = 0, self.at + 1
        while self.at < len(self.text):
            depth += (self.text[self.at] == "(") - (self.text[self.at] == ")")
            self.at += 1
            if not depth:
                break
        return _joined(_Reader(self.text[start : self.at - 1]).row())


def _operator(sign: str, before: list[_Piece]) -> _Piece:
    solid = [piece for piece in before if piece.kind != "space"]
    if sign in "−+±" and (not solid or solid[-1].kind in _BEFORE_A_SIGN):
        return _Piece("sign", f'<mo form="prefix">{sign}</mo>')
    if sign in _RELATIONS:
        return _Piece("relation", f'<mo form="infix" stretchy="false">{escape(sign)}</mo>')
    if sign == "/":
        return _Piece("binary", '<mo lspace="0" rspace="0">/</mo>')
    if sign in _BINARY:
        return _Piece("binary", f'<mo form="infix">{sign}</mo>')
    if sign in _OPEN:
        return _Piece("open", f'<mo form="prefix" stretchy="false">{sign}</mo>')
    if sign in _CLOSE:
        return _Piece("close", f'<mo form="postfix" stretchy="false">{sign}</mo>')
    if sign in _SEPARATORS:
        return _Piece("separator", f"<mo>{sign}</mo>")
    if sign in "|‖":
        return _Piece("bar", f'<mo stretchy="false" lspace="0" rspace="0">{sign}</mo>')
    if sign == "!":
        return _Piece("close", '<mo form="postfix">!</mo>')
    return _Piece("atom", f"<mo>{escape(sign)}</mo>")


def _joined(pieces: list[_Piece]) -> str:
    """Return the pieces in a row: a space is thin between factors, whole beside a word, three of them are a column's."""
    out = []
    for place, piece in enumerate(pieces):
        if piece.kind != "space":
            out.append(piece.xml)
            continue
        neighbors = {pieces[place + step].kind for step in (-1, 1) if 0 <= place + step < len(pieces)}
        if len(piece.xml) >= 3:
            width = "2em"
        elif "word" in neighbors:
            width = "0.3em"
        elif neighbors & {"relation", "binary", "separator", "sign"}:
            continue
        else:
            width = "0.2em"
        out.append(f'<mspace width="{width}"></mspace>')
    return "".join(out)
