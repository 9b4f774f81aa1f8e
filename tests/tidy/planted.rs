//! The faults of tests/planted/faults.toml still have a place: a line that has moved or changed is seen here and not only when
//! `scripts/planted-faults` comes to it.
//!
//! Invariant: a fault changes exactly one line, and changes it.

use std::fs;

use super::complain;

#[test]
fn every_planted_fault_has_its_line() {
    let list: toml::Table = fs::read_to_string("tests/planted/faults.toml").unwrap().parse().unwrap();
    let mut broken = Vec::new();
    for fault in list["fault"].as_array().unwrap() {
        let of = |key: &str| fault.get(key).map(|value| value.as_str().unwrap());
        let (name, file, line) = (of("name").unwrap(), of("file").unwrap(), of("line").unwrap());
        let text = fs::read_to_string(file).unwrap_or_default();
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        let found = match of("below") {
            None => lines.iter().filter(|there| **there == line).count(),
            Some(below) => match lines.iter().filter(|there| **there == below).count() {
                1 => {
                    let rest = lines.iter().skip_while(|there| **there != below);
                    // The first of several counts.
                    rest.take_while(|there| !there.is_empty()).filter(|there| **there == line).count().min(1)
                }
                _ => 0,
            },
        };
        if found != 1 || of("instead") == Some(line) {
            broken.push(format!("{name}: `{line}` occurs {found} times in {file}"));
        }
    }
    complain("a planted fault changes one line of a file, which is there once", broken);
}
