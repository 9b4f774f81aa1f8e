//! A benchmark's result: a line of a table for people, or a JSON object for machines.
//!
//! Invariant: both say the same, and neither leaves the ceiling out; what has no meaning is `-` in the one and null in the other.

use serde_json::{Map, Value, json};

use super::{Figure, plain_bytes};

/// Characters of the bar that stands for the ceiling.
const BAR: usize = 20;

/// One size of one benchmark.
#[derive(Clone, Debug, Default)]
pub struct Row {
    /// Which benchmark.
    pub benchmark: &'static str,
    /// Over which fabric.
    pub transport: Option<String>,
    /// The size, in the benchmark's own sense.
    pub bytes: u64,
    /// How many workers.
    pub workers: Option<u16>,
    /// How many servers.
    pub servers: Option<u16>,
    /// Bytes that count, a second.
    pub bytes_per_s: Option<f64>,
    /// The median of a round.
    pub latency_us_p50: Option<f64>,
    /// The 99th percentile of a round.
    pub latency_us_p99: Option<f64>,
    /// The 99.9th percentile of a round.
    pub latency_us_p999: Option<f64>,
    /// The rate that the machine itself reached.
    pub ceiling_bytes_per_s: Option<f64>,
    /// The median of a round of that.
    pub ceiling_latency_us: Option<f64>,
    /// Processor time of the timed rounds, of all processes.
    pub cpu_s: Option<f64>,
    /// How often a payload byte was copied by a processor on its way.
    pub bytes_copied_per_byte_sent: Option<f64>,
    /// Further fields of the object.
    pub more: Map<String, Value>,
}

/// The table's first two lines; `rate` names the column of rates.
pub fn header(rate: &str) -> String {
    let names = format!(
        "{:>9}  {:>12}  {:>12}  {:>6}  {:<BAR$}  {:>11}  {:>11}  {:>11}  {:>11}  {:>9}",
        "bytes", rate, "ceiling", "share", "of the ceiling", "p50", "p99", "p99.9", "ceiling p50", "x ceiling"
    );
    let rule = "-".repeat(names.chars().count());
    format!("{names}\n{rule}")
}

impl Row {
    /// The row with a whole figure and, if there is one, that of the ceiling.
    pub fn with(self, figure: &Figure, ceiling: Option<&Figure>) -> Row {
        Row {
            bytes_per_s: Some(figure.bytes_per_s),
            latency_us_p50: Some(figure.latency_us_p50),
            latency_us_p99: Some(figure.latency_us_p99),
            latency_us_p999: Some(figure.latency_us_p999),
            cpu_s: Some(figure.cpu_s),
            ceiling_bytes_per_s: ceiling.map(|ceiling| ceiling.bytes_per_s),
            ceiling_latency_us: ceiling.map(|ceiling| ceiling.latency_us_p50),
            ..self
        }
    }

    /// The share of the ceiling that was reached: of its rate or, where rates have no meaning, of its speed.
    pub fn share(&self) -> Option<f64> {
        let of_rate = self.bytes_per_s.zip(self.ceiling_bytes_per_s).map(|(rate, ceiling)| rate / ceiling);
        of_rate.or_else(|| self.latency_ratio().map(|ratio| 1.0 / ratio))
    }

    /// The median of a round in units of the ceiling's.
    pub fn latency_ratio(&self) -> Option<f64> {
        self.latency_us_p50.zip(self.ceiling_latency_us).map(|(median, ceiling)| median / ceiling)
    }

    /// A line under [`header`].
    pub fn line(&self) -> String {
        let none = || "-".to_string();
        let rate = |rate: Option<f64>| rate.map_or_else(none, plain_rate);
        let time = |time: Option<f64>| time.map_or_else(none, plain_time);
        let number = |number: Option<f64>| number.map_or_else(none, |number| format!("{number:.2}"));
        let bar = self.share().map_or_else(String::new, |share| {
            let filled = ((share * BAR as f64).round() as usize).min(BAR);
            format!("{}{}", "#".repeat(filled), ".".repeat(BAR - filled))
        });
        format!(
            "{:>9}  {:>12}  {:>12}  {:>6}  {bar:<BAR$}  {:>11}  {:>11}  {:>11}  {:>11}  {:>9}",
            plain_bytes(self.bytes),
            rate(self.bytes_per_s),
            rate(self.ceiling_bytes_per_s),
            number(self.share()),
            time(self.latency_us_p50),
            time(self.latency_us_p99),
            time(self.latency_us_p999),
            time(self.ceiling_latency_us),
            number(self.latency_ratio()),
        )
    }

    /// The object for machines. Numbers that are no numbers (a division by nothing) are null.
    pub fn json(&self) -> Value {
        let finite = |number: Option<f64>| number.filter(|number| number.is_finite());
        let fields = json!({
            "benchmark": self.benchmark,
            "transport": self.transport,
            "bytes": self.bytes,
            "workers": self.workers,
            "servers": self.servers,
            "goodput_bytes_per_s": finite(self.bytes_per_s).map(f64::round),
            "latency_us_p50": finite(self.latency_us_p50),
            "latency_us_p99": finite(self.latency_us_p99),
            "latency_us_p999": finite(self.latency_us_p999),
            "ceiling_bytes_per_s": finite(self.ceiling_bytes_per_s).map(f64::round),
            "ceiling_latency_us": finite(self.ceiling_latency_us),
            "cpu_s": finite(self.cpu_s),
            "bytes_copied_per_byte_sent": finite(self.bytes_copied_per_byte_sent),
            "latency_x_ceiling": finite(self.latency_ratio()),
            "share_of_ceiling": finite(self.share()),
        });
        let Value::Object(mut fields) = fields else { unreachable!("written as an object") };
        fields.extend(self.more.clone());
        Value::Object(fields)
    }
}

/// A rate as people read it.
pub fn plain_rate(bytes_per_s: f64) -> String {
    match bytes_per_s {
        rate if rate >= 1e9 => format!("{:.2} GB/s", rate / 1e9),
        rate if rate >= 1e6 => format!("{:.1} MB/s", rate / 1e6),
        rate => format!("{:.1} kB/s", rate / 1e3),
    }
}

/// A time as people read it.
pub fn plain_time(us: f64) -> String {
    match us {
        us if us >= 10e6 => format!("{:.1} s", us / 1e6),
        us if us >= 10_000.0 => format!("{:.1} ms", us / 1e3),
        us => format!("{us:.1} us"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names that whoever reads the objects relies on.
    const NAMES: [&str; 13] = [
        "benchmark",
        "transport",
        "bytes",
        "workers",
        "servers",
        "goodput_bytes_per_s",
        "latency_us_p50",
        "latency_us_p99",
        "latency_us_p999",
        "ceiling_bytes_per_s",
        "ceiling_latency_us",
        "cpu_s",
        "bytes_copied_per_byte_sent",
    ];

    fn row() -> Row {
        let figure = |rate, p50| Figure {
            bytes_per_s: rate,
            latency_us_p50: p50,
            latency_us_p99: 22_000.0,
            latency_us_p999: 11e6,
            ..Figure::default()
        };
        let row = Row {
            benchmark: "push-pull",
            transport: Some("tcp".into()),
            bytes: 1 << 20,
            workers: Some(1),
            servers: Some(1),
            bytes_copied_per_byte_sent: Some(2.0),
            ..Row::default()
        };
        row.with(&figure(1.5e9, 1400.25), Some(&figure(2e9, 1000.0)))
    }

    #[test]
    fn lines_stand_under_the_header_and_the_object_has_every_key() {
        let line = row().line();
        assert_eq!(line.len(), header("push+pull").lines().next().unwrap().len());
        assert!(line.contains("1.50 GB/s") && line.contains("  0.75  ###############.....  "), "{line}");
        assert!(line.contains("1400.2 us") && line.contains("22.0 ms") && line.contains("11.0 s"), "{line}");
        assert!(line.ends_with("  1000.0 us       1.40"), "{line}");
        let json = row().json();
        NAMES.iter().for_each(|key| assert!(!json[key].is_null(), "{key} is missing"));
    }

    #[test]
    fn what_has_no_meaning_is_there_as_nothing() {
        let row = Row { bytes_per_s: None, transport: None, ceiling_bytes_per_s: None, ..row() };
        assert_eq!(row.share().map(|share| (share * 100.0).round()), Some(71.0), "of the ceiling's speed");
        assert_eq!(row.line().len(), header("").lines().next().unwrap().len());
        let (json, bare) = (row.json(), Row::default().json());
        for name in NAMES {
            assert!(json.get(name).is_some() && bare.get(name).is_some(), "{name} is missing");
        }
        assert!(json["transport"].is_null() && json["goodput_bytes_per_s"].is_null());
        assert!(Row { cpu_s: Some(f64::NAN), ..row }.json()["cpu_s"].is_null());
    }
}
