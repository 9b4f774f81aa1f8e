//! `gradwire bench echo`: the ceiling of the exchanges by itself; and its repetitions, for the benchmarks that it stands beside.
//!
//! Invariant: of several forms of an echo the fastest by its median is the ceiling.

use clap::Args;

use super::{executable, one_size};
use crate::{
    Error, Result,
    tools::bench::{
        Figure, Pace,
        echo::{BYTES_MAX, DATAGRAM_GRAIN, DATAGRAM_MAX, Echo, Flow, Form, Over, Wait},
        parse_sizes, plain_bytes, plain_rate, plain_time,
    },
};

/// What the fabric `soft` puts into a datagram, headers not counted.
pub(super) const DATAGRAM_BYTES: u64 = 4096;

#[derive(Args)]
pub(super) struct EchoArguments {
    /// Payload of a round in each direction: sizes, or ranges that go up by a factor of 4.
    #[arg(long, value_name = "SIZE", value_delimiter = ',', num_args = 1.., default_value = "1MiB")]
    bytes: Vec<String>,
    /// How long each repetition takes, about.
    #[arg(long, default_value_t = 0.5, conflicts_with = "iterations")]
    seconds: f64,
    /// Rounds of each repetition, instead of --seconds.
    #[arg(long, value_name = "N")]
    iterations: Option<u64>,
    /// How often each size is measured; medians are printed.
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u16).range(1..))]
    repetitions: u16,
    /// Number of drivers.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    workers: u16,
    /// Number of peers.
    #[arg(short, long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    servers: u16,
    /// Print one JSON object a line.
    #[arg(long)]
    json: bool,
    /// By what means the bytes go.
    #[arg(long, value_name = "MEANS", default_value = "tcp", hide_possible_values = true)]
    over: Over,
    /// Which directions carry the bytes: both, there, back or line.
    #[arg(long, value_name = "FLOW", default_value = "both", hide_possible_values = true)]
    flow: Flow,
    /// What a process does that has nothing to do: adaptive, sleep or spin.
    #[arg(long, value_name = "POLICY", default_value = "adaptive", hide_possible_values = true)]
    wait: Wait,
    /// Bytes of a piece; peers share the pieces.
    #[arg(long, value_name = "SIZE", default_value = "1MiB")]
    piece: String,
    /// Most messages to a peer that are not answered, where they go piece by piece [default: all of a round].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    window: Option<u64>,
    /// Bytes of a datagram, for --over udp [default: 4KiB].
    #[arg(long, value_name = "SIZE")]
    datagram: Option<String>,
    /// Let buffers rotate as a job's do, for --over shm.
    #[arg(long)]
    rotate: bool,
}

/// Repetitions of an echo, form by form.
pub(super) struct Repetitions {
    echo: Echo,
    figures: Vec<(Form, Vec<Figure>)>,
}

impl Repetitions {
    pub fn new(echo: Echo) -> Repetitions {
        Repetitions { echo, figures: Vec::new() }
    }

    /// One more of every form.
    pub fn repeat(&mut self) -> Result<()> {
        for form in self.echo.forms() {
            let figure = self.echo.run(*form)?;
            match self.figures.iter_mut().find(|(known, _)| known == form) {
                Some((_, figures)) => figures.push(figure),
                None => self.figures.push((*form, vec![figure])),
            }
        }
        Ok(())
    }

    /// Each form's median.
    fn medians(&self) -> impl Iterator<Item = (Form, Figure)> + '_ {
        self.figures.iter().filter_map(|(form, figures)| Some((*form, Figure::median(figures)?)))
    }

    /// The fastest form by its median.
    pub fn fastest(&self) -> Option<(Form, Figure)> {
        // A flow that carries no bytes has no rate.
        let speed = |figure: &Figure| (figure.bytes_per_s, -figure.latency_us_p50);
        let order = |a: &(Form, Figure), b: &(Form, Figure)| {
            let (a, b) = (speed(&a.1), speed(&b.1));
            a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1))
        };
        self.medians().max_by(order)
    }
}

impl EchoArguments {
    fn echo(&self) -> Result<Echo> {
        let piece = one_size("--piece", &self.piece)?;
        let datagram = match &self.datagram {
            None => DATAGRAM_BYTES,
            Some(_) if self.over != Over::Udp => {
                return Err(Error::Config("--datagram goes with --over udp alone".into()));
            }
            Some(text) => one_size("--datagram", text)?,
        };
        if !datagram.is_multiple_of(DATAGRAM_GRAIN) || datagram > DATAGRAM_MAX {
            return Err(Error::Config(format!(
                "--datagram {datagram}: a datagram has a multiple of {DATAGRAM_GRAIN} bytes, at most {DATAGRAM_MAX}"
            )));
        }
        for (option, given) in [("rotate", self.rotate), ("flow line", self.flow == Flow::Line)] {
            if given && self.over != Over::Shm {
                return Err(Error::Config(format!("--{option} goes with --over shm alone")));
            }
        }
        Ok(Echo {
            executable: executable()?,
            over: self.over,
            flow: self.flow,
            wait: self.wait,
            bytes: 0,
            piece,
            datagram,
            window: self.window.unwrap_or(u64::from(u32::MAX)),
            rotate: self.rotate,
            drivers: self.workers,
            peers: self.servers,
            pace: self.iterations.map_or(Pace::Seconds(self.seconds), Pace::Rounds),
        })
    }
}

/// Measures the echo by itself.
pub(super) fn run(arguments: &EchoArguments) -> Result<()> {
    let echo = arguments.echo()?;
    for bytes in parse_sizes(&arguments.bytes)? {
        if bytes % 64 != 0 || bytes > BYTES_MAX {
            let most = plain_bytes(BYTES_MAX);
            return Err(Error::Config(format!("--bytes {bytes}: a size is a multiple of 64, at most {most}")));
        }
        let mut repetitions = Repetitions::new(Echo { bytes, ..echo.clone() });
        for _ in 0..arguments.repetitions {
            repetitions.repeat()?;
        }
        for (form, figure) in repetitions.medians() {
            print(arguments, &echo, bytes, form, &figure);
        }
    }
    Ok(())
}

fn print(arguments: &EchoArguments, echo: &Echo, bytes: u64, form: Form, figure: &Figure) {
    let Figure { bytes_per_s, latency_us_p50, latency_us_p99, latency_us_p999, .. } = *figure;
    if arguments.json {
        let json = serde_json::json!({
            "benchmark": "echo", "transport": echo.over.name(), "bytes": bytes, "echo": form.name(), "flow": echo.flow.name(),
            "wait": echo.wait.name(), "rotate": echo.rotate,
            "workers": arguments.workers, "servers": arguments.servers, "repetitions": arguments.repetitions,
            "goodput_bytes_per_s": bytes_per_s.round(), "latency_us_p50": latency_us_p50,
            "latency_us_p99": latency_us_p99, "latency_us_p999": latency_us_p999,
        });
        println!("{json}");
    } else {
        let (size, rate) = (plain_bytes(bytes), plain_rate(bytes_per_s));
        let [p50, p99, p999] = [latency_us_p50, latency_us_p99, latency_us_p999].map(plain_time);
        println!("{size:>9}  {:<6}  {rate:>12}  p50 {p50:>11}  p99 {p99:>11}  p99.9 {p999:>11}", form.name());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fastest_form_is_the_ceiling() {
        let figure = |rate, p50| Figure { bytes_per_s: rate, latency_us_p50: p50, ..Figure::default() };
        let of = |whole: Vec<Figure>, pieces: Vec<Figure>| Repetitions {
            echo: Echo {
                executable: "none".into(),
                over: Over::Tcp,
                flow: Flow::Both,
                wait: Wait::Adaptive,
                bytes: 64,
                piece: 64,
                datagram: 64,
                window: 1,
                rotate: false,
                drivers: 1,
                peers: 1,
                pace: Pace::Rounds(5),
            },
            figures: vec![(Form::Whole, whole), (Form::Pieces, pieces)],
        };
        let fastest = of(
            vec![figure(3.0, 1.0), figure(1.0, 1.0), figure(9.0, 1.0)],
            vec![figure(4.0, 2.0), figure(4.0, 2.0), figure(5.0, 2.0)],
        );
        assert_eq!(fastest.fastest(), Some((Form::Pieces, figure(4.0, 2.0))));
        assert_eq!(
            of(vec![figure(0.0, 1.0)], vec![figure(0.0, 2.0)]).fastest().map(|(form, _)| form),
            Some(Form::Whole)
        );
        assert_eq!(of(Vec::new(), Vec::new()).fastest(), None);
    }
}
