//! Text to tokens.
//!
//! Invariant: every token knows its line; comments and blanks leave no trace.

use crate::ParseError;

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Kind {
    /// A directive, opcode, register, label or symbol: letters, digits and any of `. _ $ %`.
    Word(String),
    /// An integer, or the bits of a floating-point literal.
    Number(u64),
    /// Text in quotes (of a pragma), which means nothing here.
    Text,
    /// Any other character.
    Mark(char),
}

#[derive(Clone, Debug)]
pub(crate) struct Token {
    pub(crate) kind: Kind,
    pub(crate) line: u32,
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '$' | '%')
}

/// The value of a numeral: decimal, `0x` hexadecimal, or `0f`/`0d` with the bits of an f32 or f64.
fn number(text: &str) -> Option<u64> {
    match text.get(..2) {
        Some("0f" | "0F" | "0d" | "0D" | "0x") => u64::from_str_radix(&text[2..], 16).ok(),
        _ => text.parse().ok(),
    }
}

pub(crate) fn tokens(text: &str) -> Result<Vec<Token>, ParseError> {
    let mut tokens = Vec::new();
    for (index, whole) in text.lines().enumerate() {
        let line = index as u32 + 1;
        let mut rest = whole.split("//").next().unwrap_or("").trim_start();
        while let Some(first) = rest.chars().next() {
            let negative = first == '-' && rest[1..].starts_with(|c: char| c.is_ascii_digit());
            let start = usize::from(negative);
            let len = rest[start..].find(|c| !is_word(c)).unwrap_or(rest.len() - start);
            let (kind, used) = if first == '"' {
                let end = rest[1..].find('"').map(|at| at + 2);
                (Kind::Text, end.ok_or(ParseError { line, message: "a text without an end".into() })?)
            } else if first.is_ascii_digit() && rest[..len].contains('.') {
                // A version.
                (Kind::Text, len)
            } else if negative || first.is_ascii_digit() {
                let value = number(&rest[start..start + len]);
                let value = value
                    .ok_or_else(|| ParseError { line, message: format!("{} is no number", &rest[..start + len]) })?;
                (Kind::Number(if negative { value.wrapping_neg() } else { value }), start + len)
            } else if len > 0 {
                (Kind::Word(rest[..len].to_owned()), len)
            } else {
                (Kind::Mark(first), first.len_utf8())
            };
            tokens.push(Token { kind, line });
            rest = rest[used..].trim_start();
        }
    }
    Ok(tokens)
}
