//! A table of ours against the C header that it stands for: a C program prints every offset, size and number that we believe.
//!
//! Invariant: where there is no compiler or no header this is said aloud, and under CI it is a failure.
#![forbid(unsafe_code)]

use std::process::Command;

/// Compiles `declarations` (includes, and what the compiler itself is to check) with a program that prints each expression of
/// `beliefs`, and compares what it prints. `header` comes in the Debian package `package`.
///
/// # Panics
///
/// If something differs, or the program does not compile although the header is there.
pub fn compare(declarations: &str, header: &str, package: &str, beliefs: &[(&str, i64)]) {
    let dir = tempfile::tempdir().unwrap();
    let (source, program) = (dir.path().join("layout.c"), dir.path().join("layout"));
    let mut text =
        format!("#include <stddef.h>\n#include <stdio.h>\n#include <{header}>\n{declarations}int main(void) {{\n");
    for (expression, _) in beliefs {
        text.push_str(&format!("    printf(\"%lld\\n\", (long long)({expression}));\n"));
    }
    std::fs::write(&source, text + "    return 0;\n}\n").unwrap();
    let compiled = Command::new("cc").arg("-o").arg(&program).arg(&source).output();
    let absence = match &compiled {
        Err(error) => Some(format!("cc: {error}")),
        Ok(output) if !output.status.success() => {
            let message = String::from_utf8_lossy(&output.stderr).into_owned();
            let is_missing = message.contains(&format!("{header}: No such file"));
            assert!(is_missing, "the layout program does not compile: {message}");
            Some(format!("no <{header}> (`apt-get install {package}`)"))
        }
        Ok(_) => None,
    };
    if let Some(absence) = absence {
        assert!(std::env::var_os("CI").is_none(), "under CI the layout must be compared: {absence}");
        eprintln!("SKIPPED the comparison with <{header}>: {absence}");
        return;
    }
    let output = Command::new(&program).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let found: Vec<i64> = text.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(found.len(), beliefs.len());
    for (found, (expression, believed)) in found.iter().zip(beliefs) {
        assert_eq!(found, believed, "{expression}");
    }
}

#[test]
#[should_panic(expected = "sizeof(int)")]
fn a_wrong_belief_is_told_by_its_expression() {
    compare("", "limits.h", "libc6-dev", &[("sizeof(char)", 1), ("sizeof(int)", 3)]);
}
