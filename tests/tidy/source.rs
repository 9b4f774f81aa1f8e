//! Rust source as tidy sees it: words and signs without comments and literals, the comments apart, and what can be read off them.
//!
//! Invariant: every token keeps its line, and nothing inside a comment or a literal is ever taken for code.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// A word or a sign of the code.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    pub text: String,
    pub line: usize,
}

/// One file.
pub struct Source {
    /// Relative to the repository, with `/` between the parts.
    pub path: String,
    pub text: String,
    pub tokens: Vec<Token>,
    /// Comments with the line on which they begin.
    pub comments: Vec<Token>,
}

/// A path of modules that the code names, from the crate's root on.
pub struct Import {
    pub path: Vec<String>,
    pub line: usize,
}

/// A function and its lines from `fn` to the closing brace.
pub struct Function {
    pub name: String,
    pub line: usize,
    pub lines: usize,
}

/// Every `.rs` file under some folders of the repository.
pub fn read_all(folders: &[&str]) -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders: Vec<PathBuf> = folders.iter().map(|folder| root.join(folder)).collect();
    let mut sources = Vec::new();
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let relative = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
                sources.push(Source::new(relative, fs::read_to_string(&path).unwrap()));
            }
        }
    }
    sources.sort_by(|a, b| a.path.cmp(&b.path));
    sources
}

impl Source {
    pub fn new(path: String, text: String) -> Source {
        let (tokens, comments) = scan(&text);
        Source { path, text, tokens, comments }
    }

    /// The module that a file under `src` is: `["server", "shard"]`.
    pub fn module(&self) -> Vec<String> {
        let inside = self.path.trim_start_matches("src/").trim_end_matches(".rs");
        let mut module: Vec<String> = inside.split('/').map(str::to_owned).collect();
        if matches!(module.last().map(String::as_str), Some("mod" | "lib")) {
            module.pop();
        }
        module
    }

    /// The leading `//!` lines.
    pub fn module_docs(&self) -> String {
        let lines = self.text.lines().take_while(|line| line.starts_with("//!"));
        lines.map(|line| line.trim_start_matches("//!")).collect()
    }

    /// Whether the code at `at` reads as these words and signs.
    pub fn reads(&self, at: usize, expected: &[&str]) -> bool {
        self.tokens
            .get(at..at + expected.len())
            .is_some_and(|tokens| tokens.iter().zip(expected).all(|(a, b)| a.text == *b))
    }

    /// Lines on which these words and signs begin.
    pub fn lines_with(&self, expected: &[&str]) -> Vec<usize> {
        (0..self.tokens.len()).filter(|at| self.reads(*at, expected)).map(|at| self.tokens[at].line).collect()
    }

    /// Every path that begins with `crate` or `super`.
    pub fn imports(&self) -> Vec<Import> {
        let file = self.module();
        // Modules that the file opens itself, with the depth of their braces.
        let mut inner: Vec<(String, usize)> = Vec::new();
        let (mut depth, mut at) = (0, 0);
        let mut imports = Vec::new();
        while at < self.tokens.len() {
            match self.tokens[at].text.as_str() {
                "mod" if self.tokens.get(at + 2).is_some_and(|next| next.text == "{") => {
                    depth += 1;
                    inner.push((self.tokens[at + 1].text.clone(), depth));
                    at += 2;
                }
                "{" => depth += 1,
                "}" => {
                    inner.retain(|(_, opened)| *opened < depth);
                    depth -= 1;
                }
                start @ ("crate" | "super") if self.reads(at + 1, &[":", ":"]) => {
                    let mut base = Vec::new();
                    if start == "super" {
                        base.extend(file.iter().cloned().chain(inner.iter().map(|(name, _)| name.clone())));
                        base.pop();
                    }
                    at = self.tree(at + 1, base, &mut imports);
                    continue;
                }
                _ => {}
            }
            at += 1;
        }
        imports
    }

    /// Reads `::a::{b, c::d}` from `at` on; returns where it ends.
    fn tree(&self, mut at: usize, mut base: Vec<String>, imports: &mut Vec<Import>) -> usize {
        let line = self.tokens[at].line;
        while self.reads(at, &[":", ":"]) {
            let Some(next) = self.tokens.get(at + 2) else { break };
            match next.text.as_str() {
                "super" => {
                    base.pop();
                }
                "{" => {
                    at += 3;
                    while !self.reads(at, &["}"]) {
                        at = self.branch(at, base.clone(), imports);
                    }
                    return at + 1;
                }
                word if is_word(word) => base.push(word.to_owned()),
                "*" => {
                    at += 3;
                    break;
                }
                _ => break,
            }
            at += 3;
        }
        imports.push(Import { path: base, line });
        at
    }

    /// One branch between braces, with the comma after it.
    fn branch(&self, at: usize, mut base: Vec<String>, imports: &mut Vec<Import>) -> usize {
        if is_word(&self.tokens[at].text) && self.tokens[at].text != "self" {
            base.push(self.tokens[at].text.clone());
        }
        let mut end = self.tree(at + 1, base, imports);
        while !self.reads(end, &[","]) && !self.reads(end, &["}"]) {
            end += 1; // `as name`
        }
        end + usize::from(self.reads(end, &[","]))
    }

    /// Every function with a body.
    pub fn functions(&self) -> Vec<Function> {
        let mut functions = Vec::new();
        for at in 0..self.tokens.len() {
            let named = self.tokens[at].text == "fn" && self.tokens.get(at + 1).is_some_and(|next| is_word(&next.text));
            let Some(open) = self.body(at).filter(|_| named) else { continue };
            let (line, end) = (self.tokens[at].line, self.tokens[self.closing(open)].line);
            functions.push(Function { name: self.tokens[at + 1].text.clone(), line, lines: end - line + 1 });
        }
        functions
    }

    /// The lines between the braces of `mod tests { … }`.
    pub fn test_lines(&self) -> Vec<std::ops::Range<usize>> {
        let opens = (0..self.tokens.len()).filter(|at| self.reads(*at, &["mod", "tests", "{"]));
        opens.map(|at| self.tokens[at].line..self.tokens[self.closing(at + 2)].line).collect()
    }

    /// The brace that opens the body of what is declared at `at`, unless a semicolon ends it first.
    fn body(&self, at: usize) -> Option<usize> {
        let mut nesting = 0;
        for (index, token) in self.tokens.iter().enumerate().skip(at) {
            match token.text.as_str() {
                "(" | "[" => nesting += 1,
                ")" | "]" => nesting -= 1,
                "{" if nesting == 0 => return Some(index),
                ";" if nesting == 0 => return None,
                _ => {}
            }
        }
        None
    }

    fn closing(&self, open: usize) -> usize {
        let mut depth = 0;
        for (index, token) in self.tokens.iter().enumerate().skip(open) {
            match token.text.as_str() {
                "{" => depth += 1,
                "}" => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                return index;
            }
        }
        panic!("{}:{}: a brace without its end", self.path, self.tokens[open].line)
    }
}

pub fn is_word(text: &str) -> bool {
    text.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

/// Takes a file apart into tokens and comments; literals and lifetimes become a single `'` or `"`.
fn scan(text: &str) -> (Vec<Token>, Vec<Token>) {
    let (mut tokens, mut comments) = (Vec::new(), Vec::new());
    let (mut rest, mut line) = (text, 1);
    while let Some(first) = rest.chars().next() {
        let (len, kind) = measure(rest, first);
        let (piece, tail) = rest.split_at(len);
        match kind {
            Kind::Blank => {}
            Kind::Comment => comments.push(Token { text: piece.to_owned(), line }),
            Kind::Literal => tokens.push(Token { text: piece[..1].to_owned(), line }),
            Kind::Code => tokens.push(Token { text: piece.to_owned(), line }),
        }
        line += piece.matches('\n').count();
        rest = tail;
    }
    (tokens, comments)
}

enum Kind {
    Blank,
    Comment,
    Literal,
    Code,
}

/// Length and kind of the piece at the start of `rest`.
fn measure(rest: &str, first: char) -> (usize, Kind) {
    if first.is_whitespace() {
        return (first.len_utf8(), Kind::Blank);
    }
    if rest.starts_with("//") {
        return (rest.find('\n').unwrap_or(rest.len()), Kind::Comment);
    }
    if rest.starts_with("/*") {
        return (block_comment(rest), Kind::Comment);
    }
    if let Some(len) = literal(rest, first) {
        return (len, Kind::Literal);
    }
    if first.is_alphanumeric() || first == '_' {
        return (rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len()), Kind::Code);
    }
    (first.len_utf8(), Kind::Code)
}

fn block_comment(rest: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    loop {
        if rest[at..].starts_with("/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if rest[at..].starts_with("*/") {
            (depth, at) = (depth - 1, at + 2);
        } else {
            at += rest[at..].chars().next().expect("a comment that ends").len_utf8();
        }
        if depth == 0 {
            return at;
        }
    }
}

/// The length of a string, a character or a lifetime.
fn literal(rest: &str, first: char) -> Option<usize> {
    let prefix = rest.find(|c: char| !matches!(c, 'b' | 'c' | 'r')).unwrap_or(0);
    let body = &rest[prefix..];
    let hashes = body.len() - body.trim_start_matches('#').len();
    if rest[..prefix].ends_with('r') && body[hashes..].starts_with('"') {
        let end = format!("\"{}", "#".repeat(hashes));
        let start = prefix + hashes + 1;
        return Some(start + rest[start..].find(&end).expect("a string that ends") + end.len());
    }
    if prefix <= 1 && body.starts_with('"') {
        return Some(prefix + 1 + quoted(&body[1..], '"'));
    }
    if first == '\'' || rest.starts_with("b'") {
        let inside = body.strip_prefix('\'')?;
        let mut characters = inside.chars();
        let (one, two) = (characters.next()?, characters.next());
        if one == '\\' || two == Some('\'') {
            return Some(prefix + 1 + quoted(inside, '\''));
        }
        let name = inside.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(inside.len());
        return Some(1 + name); // a lifetime
    }
    None
}

/// The length of what follows an opening quote, with the closing one.
fn quoted(inside: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in inside.char_indices() {
        if !escaped && c == quote {
            return at + c.len_utf8();
        }
        escaped = !escaped && c == '\\';
    }
    panic!("a literal without its end")
}
