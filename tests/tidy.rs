//! The house rules, as tests: layers, docs, sizes, `unsafe`, what the crate's root exports, and what may not be left lying about.
//!
//! Invariant: a rule is written here once; whoever breaks it is told the file, the line and the rule.

#[path = "tidy/locks.rs"]
mod locks;
#[path = "tidy/planted.rs"]
mod planted;
#[path = "tidy/source.rs"]
mod source;
#[path = "tidy/waits.rs"]
mod waits;

use source::{Import, Source, is_word, read_all};

/// Modules by level, lowest first: a module imports from lower levels only, so the modules of one level never from each other.
const LEVELS: &[&[&str]] = &[
    &["types"],
    &["error"],
    &["consistency", "layout", "observe", "rc", "sys", "wire"],
    &["cuda"],
    &["mem"],
    &["optim", "transport"],
    &["checkpoint", "session"],
    &["server", "worker"],
    &["launch", "tools", "world"],
    &["cli", "ffi"],
    &["main"],
];

/// Inside `transport`: drivers know the trait and what they share, and never each other.
const DRIVERS: &[&str] = &["shm", "sim", "soft", "tcp", "verbs"];

/// What drivers share: armed slots, what is to be told, readiness.
const SHARED: &[&str] = &["done", "poller", "region_table"];

/// The only places where `unsafe` may stand; everything else is under `#![forbid(unsafe_code)]`.
const UNSAFE_ALLOWED: &[&str] = &[
    "checkpoint::disk",
    "checkpoint::stream",
    "cuda",
    "ffi",
    "launch::spawn",
    "mem",
    "optim::gpu::meter",
    "optim::gpu::pipeline",
    "optim::prefetch",
    "sys",
    "transport::region_table",
    "transport::shm",
    "transport::tcp",
    "transport::verbs",
];

const FILE_LINES_MAX: usize = 500;
/// What a program has written: scripts/verbs-table. Lengths and comments are that program's affair.
const GENERATED: &str = "src/sys/verbs/generated.rs";
const FUNCTION_LINES_MAX: usize = 70;
const ROOT_NAMES_MAX: usize = 20;
const EVERYWHERE: &[&str] = &["src", "tests", "examples", "benches", "fuzz/fuzz_targets", "python/src"];

fn complain(rule: &str, broken: Vec<String>) {
    assert!(broken.is_empty(), "{rule}\n  {}", broken.join("\n  "));
}

fn level(module: &str) -> Option<usize> {
    LEVELS.iter().position(|level| level.contains(&module))
}

/// The module at the root that an import goes to; the root's own names are those of `error`.
fn target(import: &Import) -> Option<&str> {
    let first = import.path.first()?;
    Some(if matches!(first.as_str(), "Error" | "Result") { "error" } else { first })
}

#[test]
fn modules_import_from_lower_levels_only() {
    let mut broken = Vec::new();
    let mut seen = 0;
    for source in read_all(&["src"]) {
        let module = source.module();
        let Some(own) = module.first() else { continue };
        let Some(own_level) = level(own) else {
            broken.push(format!("{}: module {own} has no level", source.path));
            continue;
        };
        for import in source.imports() {
            seen += 1;
            let Some(other) = target(&import) else {
                broken.push(format!("{}:{}: everything at the crate's root", source.path, import.line));
                continue;
            };
            let lower = level(other).is_some_and(|level| level < own_level);
            if other != own && !lower {
                broken.push(format!("{}:{}: {own} imports {}", source.path, import.line, import.path.join("::")));
            }
        }
    }
    assert!(seen > 200, "only {seen} imports found: the scanner is blind");
    complain("a module imports only from levels below its own (the table is in tests/tidy.rs)", broken);
}

/// The part of `transport` that a module path lies in; the trait's own names count as none.
fn part(path: &[String]) -> Option<&str> {
    let (first, rest) = path.split_first()?;
    (first == "transport").then(|| rest.first().map(String::as_str))?
}

#[test]
fn drivers_know_the_trait_and_what_they_share_only() {
    let sources = read_all(&["src/transport"]);
    let root = sources.iter().find(|source| source.path == "src/transport/mod.rs").expect("the trait's file");
    let declares =
        |name: &str| ["trait", "struct", "enum"].iter().any(|kind| !root.lines_with(&[kind, name]).is_empty());
    let mut broken = Vec::new();
    for source in &sources {
        let module = source.module();
        let own = part(&module);
        for import in source.imports() {
            let Some(other) = part(&import.path).filter(|other| Some(*other) != own && !declares(other)) else {
                continue;
            };
            let allowed = match own {
                Some("fabrics") => true,
                Some(own) if DRIVERS.contains(&own) => SHARED.contains(&other),
                _ => !DRIVERS.contains(&other) && other != "fabrics",
            };
            if !allowed {
                broken.push(format!("{}:{}: imports {}", source.path, import.line, import.path.join("::")));
            }
        }
    }
    for driver in DRIVERS {
        let lines = root.lines_with(&["use", driver]);
        broken
            .extend(lines.iter().map(|line| format!("src/transport/mod.rs:{line}: the trait's file imports {driver}")));
    }
    complain(
        "inside transport a driver imports the trait and what drivers share; `fabrics` alone imports drivers",
        broken,
    );
}

#[test]
fn every_file_says_what_it_is_for() {
    let mut broken = Vec::new();
    for source in read_all(EVERYWHERE) {
        let docs = source.module_docs();
        if docs.split_whitespace().count() < 5 {
            broken.push(format!("{}: does not open with //! docs", source.path));
        } else if source.path.starts_with("src/") && !docs.contains("Invariant:") {
            broken.push(format!("{}: its docs name no Invariant:", source.path));
        }
    }
    complain("every file opens with what it is for, and under src with its invariant", broken);
}

#[test]
fn files_and_functions_fit() {
    let mut broken = Vec::new();
    for source in read_all(EVERYWHERE) {
        let lines = source.text.lines().count();
        if lines > FILE_LINES_MAX && source.path != GENERATED {
            broken.push(format!("{}: {lines} lines", source.path));
        }
        for function in source.functions().into_iter().filter(|function| function.lines > FUNCTION_LINES_MAX) {
            broken.push(format!("{}:{}: fn {}: {} lines", source.path, function.line, function.name, function.lines));
        }
    }
    complain(&format!("a file has at most {FILE_LINES_MAX} lines, a function {FUNCTION_LINES_MAX}"), broken);
}

/// Whether `module` is one of the places in `UNSAFE_ALLOWED`, or under it.
fn may_be_unsafe(module: &[String]) -> bool {
    let path = module.join("::");
    UNSAFE_ALLOWED.iter().any(|allowed| path == *allowed || path.starts_with(&format!("{allowed}::")))
}

#[test]
fn unsafe_stands_only_where_it_belongs() {
    const FORBID: &[&str] = &["#", "!", "[", "forbid", "(", "unsafe_code", ")", "]"];
    let sources = read_all(&["src"]);
    let mut forbidding = Vec::new();
    for source in sources.iter().filter(|source| !source.lines_with(FORBID).is_empty()) {
        forbidding.push(source.module());
    }
    let mut broken = Vec::new();
    for source in &sources {
        let module = source.module();
        if may_be_unsafe(&module) || source.path == "src/lib.rs" {
            continue;
        }
        let forbidden = (1..=module.len()).any(|len| forbidding.iter().any(|other| other == &module[..len]));
        // A module that only holds others, some of which may be unsafe, cannot forbid it for itself alone.
        let holds_unsafe =
            UNSAFE_ALLOWED.iter().any(|allowed| allowed.starts_with(&format!("{}::", module.join("::"))));
        if !forbidden && !holds_unsafe {
            broken.push(format!("{}: neither it nor a module above it says #![forbid(unsafe_code)]", source.path));
        }
        let lines = source.lines_with(&["unsafe"]);
        broken.extend(lines.iter().map(|line| format!("{}:{line}: unsafe has no place here", source.path)));
    }
    complain("unsafe only where the table in tests/tidy.rs allows it", broken);
}

/// Whether the comment before the statement that `line` belongs to says why it is sound.
fn is_explained(source: &Source, line: usize) -> bool {
    let lines: Vec<&str> = source.text.lines().collect();
    let is_comment = |at: &usize| lines[*at].trim_start().starts_with("//");
    // The statement may have begun up to three lines above the word.
    let Some(last) = (line.saturating_sub(4)..line).rev().find(is_comment) else { return false };
    (0..=last).rev().take_while(is_comment).any(|at| lines[at].contains("SAFETY:"))
}

#[test]
fn every_unsafe_block_says_why_it_is_sound() {
    let mut broken = Vec::new();
    for source in read_all(EVERYWHERE).into_iter().filter(|source| source.path != GENERATED) {
        let mut lines = source.lines_with(&["unsafe", "{"]);
        lines.extend(source.lines_with(&["unsafe", "impl"]));
        let unexplained = lines.into_iter().filter(|line| !is_explained(&source, *line));
        broken.extend(unexplained.map(|line| format!("{}:{line}", source.path)));
    }
    complain("every unsafe block and impl has a SAFETY: comment", broken);
}

#[test]
fn the_root_exports_few_names() {
    let sources = read_all(&["src"]);
    let root = sources.iter().find(|source| source.path == "src/lib.rs").expect("the crate's root");
    let mut names = Vec::new();
    for at in 0..root.tokens.len() {
        // A hidden module is for the binary and the tests.
        let hidden = at >= 4 && root.reads(at - 4, &["(", "hidden", ")", "]"]);
        if root.reads(at, &["pub", "mod"]) && !hidden {
            names.push(root.tokens[at + 2].text.clone());
        } else if root.reads(at, &["pub", "use"]) {
            let tree = root.tokens[at + 2..].iter().take_while(|token| token.text != ";").collect::<Vec<_>>();
            let leaf = |index: &usize| tree.get(index + 1).is_none_or(|next| next.text == "," || next.text == "}");
            let leaves = (0..tree.len()).filter(|index| is_word(&tree[*index].text)).filter(leaf);
            names.extend(leaves.map(|index| tree[index].text.clone()));
        }
    }
    assert!(names.len() >= 10 && names.len() <= ROOT_NAMES_MAX, "{} names at the root: {names:?}", names.len());
}

#[test]
fn nothing_is_left_unfinished() {
    let mut broken = Vec::new();
    for source in read_all(EVERYWHERE) {
        for comment in &source.comments {
            let marks = ["TO\u{44}O", "FIX\u{4d}E", "XX\u{58}"];
            if marks.iter().any(|mark| comment.text.split(|c: char| !c.is_alphanumeric()).any(|word| word == *mark)) {
                broken.push(format!("{}:{}: {}", source.path, comment.line, comment.text.trim()));
            }
        }
        for unfinished in [["todo", "!"], ["unimplemented", "!"]] {
            let lines = source.lines_with(&unfinished);
            broken.extend(lines.iter().map(|line| format!("{}:{line}: {}!", source.path, unfinished[0])));
        }
        let lines = source.lines_with(&["[", "ignore", "]"]);
        broken.extend(lines.iter().map(|line| format!("{}:{line}: a test is ignored without a reason", source.path)));
    }
    complain("nothing unfinished is left lying about", broken);
}

/// The scanner itself: what it must not be fooled by.
#[test]
fn the_scanner_reads_code_and_nothing_else() {
    let text = r##"
        // crate::comment  unsafe { }
        /* outer /* super::inner */ crate::still */
        use crate::{a::{self, B}, c::*, d as e};
        fn f<'a>(x: &'a str) -> char { let _ = ("crate::text \" {", r#"unsafe " {"#, b'{', '\'', '{'); 'x' }
        mod tests { use super::super::up; mod deep { use super::g; } }
        fn h() -> crate::i::J<u8> where u8: Copy { crate::k::l::<u8>() }
    "##;
    let source = Source::new("src/m/n.rs".into(), text.into());
    let paths: Vec<String> = source.imports().iter().map(|import| import.path.join("::")).collect();
    assert_eq!(paths, ["a", "a::B", "c", "d", "m::up", "m::n::tests::g", "i::J", "k::l"]);
    assert_eq!(source.functions().iter().map(|function| function.name.as_str()).collect::<Vec<_>>(), ["f", "h"]);
    assert!(source.lines_with(&["unsafe"]).is_empty());
    assert_eq!(source.comments.len(), 2);
}
