//! A benchmark's result: a line of a table for people, or a JSON object for machines.
//!
//! Invariant: both say the same, and neither leaves the ceiling out.

use serde_json::{Value, json};

use super::{Figure, plain_bytes};

/// Characters of the bar that stands for the ceiling.
const BAR: usize = 20;

/// One size of one benchmark.
#[derive(Clone, Debug)]
pub struct Row {
    /// Which benchmark.
    pub benchmark: &'static str,
    /// Over which fabric.
    pub transport: String,
    /// Payload that each worker pushes, and pulls, in a round.
    pub bytes: u64,
    /// How many workers.
    pub workers: u16,
    /// How many servers.
    pub servers: u16,
    /// Number format on the wire.
    pub dtype: String,
    /// What the servers step with.
    pub optimizer: String,
    /// How often it was measured; all figures are medians of that.
    pub repetitions: usize,
    /// What the job reached.
    pub figure: Figure,
    /// What the raw echo reached.
    pub ceiling: Figure,
    /// By what means it did.
    pub ceiling_over: &'static str,
    /// How its processes waited.
    pub ceiling_wait: &'static str,
    /// In which form of the echo they reached it.
    pub ceiling_echo: &'static str,
}

/// The table's first two lines.
pub fn header() -> String {
    let names = format!(
        "{:>9}  {:>12}  {:>12}  {:>6}  {:<BAR$}  {:>11}  {:>11}  {:>11}  {:>9}",
        "bytes", "push+pull", "ceiling", "share", "of the ceiling", "p50", "p99", "ceiling p50", "x ceiling"
    );
    let rule = "-".repeat(names.chars().count());
    format!("{names}\n{rule}")
}

impl Row {
    /// The share of the ceiling's rate that was reached.
    pub fn share(&self) -> f64 {
        self.figure.bytes_per_s / self.ceiling.bytes_per_s
    }

    /// The median of a round in units of the ceiling's.
    pub fn latency_ratio(&self) -> f64 {
        self.figure.latency_us_p50 / self.ceiling.latency_us_p50
    }

    /// A line under [`header`].
    pub fn line(&self) -> String {
        let filled = ((self.share() * BAR as f64).round() as usize).min(BAR);
        let bar = format!("{}{}", "#".repeat(filled), ".".repeat(BAR - filled));
        format!(
            "{:>9}  {:>12}  {:>12}  {:>6.2}  {bar}  {:>11}  {:>11}  {:>11}  {:>9.2}",
            plain_bytes(self.bytes),
            plain_rate(self.figure.bytes_per_s),
            plain_rate(self.ceiling.bytes_per_s),
            self.share(),
            plain_time(self.figure.latency_us_p50),
            plain_time(self.figure.latency_us_p99),
            plain_time(self.ceiling.latency_us_p50),
            self.latency_ratio(),
        )
    }

    /// The object for machines.
    pub fn json(&self) -> Value {
        json!({
            "benchmark": self.benchmark,
            "transport": self.transport,
            "bytes": self.bytes,
            "workers": self.workers,
            "servers": self.servers,
            "dtype": self.dtype,
            "optimizer": self.optimizer,
            "repetitions": self.repetitions,
            "goodput_bytes_per_s": self.figure.bytes_per_s.round(),
            "latency_us_p50": self.figure.latency_us_p50,
            "latency_us_p99": self.figure.latency_us_p99,
            "ceiling_bytes_per_s": self.ceiling.bytes_per_s.round(),
            "ceiling_latency_us": self.ceiling.latency_us_p50,
            "ceiling_echo": self.ceiling_echo,
            "ceiling_over": self.ceiling_over,
            "ceiling_wait": self.ceiling_wait,
            "latency_x_ceiling": self.latency_ratio(),
        })
    }
}

fn plain_rate(bytes_per_s: f64) -> String {
    match bytes_per_s {
        rate if rate >= 1e9 => format!("{:.2} GB/s", rate / 1e9),
        rate if rate >= 1e6 => format!("{:.1} MB/s", rate / 1e6),
        rate => format!("{:.1} kB/s", rate / 1e3),
    }
}

fn plain_time(us: f64) -> String {
    if us >= 10_000.0 { format!("{:.1} ms", us / 1e3) } else { format!("{us:.1} us") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_stand_under_the_header_and_the_object_has_every_key() {
        let figure = Figure { bytes_per_s: 1.5e9, latency_us_p50: 1400.25, latency_us_p99: 22_000.0 };
        let row = Row {
            benchmark: "push-pull",
            transport: "tcp".into(),
            bytes: 1 << 20,
            workers: 1,
            servers: 1,
            dtype: "f32".into(),
            optimizer: "none".into(),
            repetitions: 5,
            figure,
            ceiling: Figure { bytes_per_s: 2e9, latency_us_p50: 1000.0, latency_us_p99: 1100.0 },
            ceiling_over: "tcp",
            ceiling_wait: "adaptive",
            ceiling_echo: "whole",
        };
        let line = row.line();
        assert_eq!(line.len(), header().lines().next().unwrap().len());
        assert!(line.contains("1.50 GB/s") && line.contains("  0.75  ###############.....  "), "{line}");
        assert!(line.contains("1400.2 us") && line.contains("22.0 ms"), "{line}");
        assert!(line.ends_with("  1000.0 us       1.40"), "{line}");
        let json = row.json();
        let required =
            ["benchmark", "transport", "bytes", "workers", "servers", "goodput_bytes_per_s", "latency_us_p50"];
        let required = required.iter().chain(&["latency_us_p99", "ceiling_bytes_per_s", "ceiling_latency_us"]);
        required.for_each(|key| assert!(!json[key].is_null(), "{key} is missing"));
    }
}
