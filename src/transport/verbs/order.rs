//! Order over several rails: what arrives on them is delivered, and what they have sent is reported, in the order of posting.
//!
//! Every rail keeps its own order. So notes of a path carry a number, and the next one to deliver is always at the head of a rail
//! or still on its way; it waits where it lies, in its rail's note ring, and its credit goes back when it is delivered. Hence
//! nothing is held beyond what the rings hold, and with one rail nothing ever waits.
//!
//! Invariant: numbers come out one after the other, without gap or repetition; a rail never has more waiting than its ring holds.
#![forbid(unsafe_code)]

use std::collections::VecDeque;

use super::RAILS_MAX;

/// Notes are numbered modulo this, on the path. More than all rings of a path hold, so that two notes that are on their way never
/// have the same number; and below the words that stand in a number's place (`rail`).
pub(super) const NUMBERS: u16 = 1 << 15;

const _: () = assert!(NUMBERS as usize > RAILS_MAX * super::options::RING_ENTRIES_MAX as usize);

/// The number behind one.
#[inline]
pub(super) fn next(number: u16) -> u16 {
    (number + 1) % NUMBERS
}

/// Notes that are here and not delivered, by rail.
#[derive(Debug)]
pub(super) struct Arrivals {
    rails: Vec<Waiting>,
    expected: u16,
}

#[derive(Debug)]
struct Waiting {
    numbers: VecDeque<u16>,
    /// Entries of the rail's ring.
    room: usize,
}

impl Arrivals {
    /// Nothing has arrived yet, on rails whose rings have so many entries.
    pub(super) fn new(rings: impl IntoIterator<Item = u16>) -> Arrivals {
        let waiting = |entries| Waiting { numbers: VecDeque::new(), room: usize::from(entries) };
        Arrivals { rails: rings.into_iter().map(waiting).collect(), expected: 0 }
    }

    /// Lets a note that has come on a rail be delivered at once, if it is the next one; whether it is.
    #[inline]
    pub(super) fn passes(&mut self, rail: usize, number: u16) -> bool {
        if number != self.expected || !self.rails[rail].numbers.is_empty() {
            return false;
        }
        self.expected = next(number);
        true
    }

    /// Whether nothing waits for a note before it.
    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.rails.iter().all(|rail| rail.numbers.is_empty())
    }

    /// A note has come on a rail, which is to wait for its turn. An error is what is wrong with that.
    pub(super) fn arrived(&mut self, rail: usize, number: u16) -> Result<(), String> {
        let Waiting { numbers, room } = &mut self.rails[rail];
        if number >= NUMBERS {
            return Err(format!("it sent a note under {number}, which is no number of a note"));
        }
        if numbers.len() == *room {
            return Err(format!("it wrote over a note ring of {room} entries that was full"));
        }
        numbers.push_back(number);
        Ok(())
    }

    /// The rail whose oldest note is to be delivered now. An error if no note that may still come can be the next one.
    pub(super) fn take(&mut self) -> Result<Option<usize>, String> {
        let mut is_stuck = true;
        for (rail, Waiting { numbers, .. }) in self.rails.iter_mut().enumerate() {
            match numbers.front() {
                Some(number) if *number == self.expected => {
                    numbers.pop_front();
                    self.expected = next(self.expected);
                    return Ok(Some(rail));
                }
                Some(_) => {}
                None => is_stuck = false,
            }
        }
        match is_stuck {
            // Rails keep their order: what is behind these is later still.
            true => Err(format!("it sent notes out of turn: number {} is missing", self.expected)),
            false => Ok(None),
        }
    }
}

/// What was handed to rails and has not been reported, in the order of posting.
#[derive(Debug)]
pub(super) struct Departures<T> {
    waiting: VecDeque<(T, bool)>,
    /// The number of the first of them, counted without end.
    first: u64,
}

impl<T> Departures<T> {
    /// Nothing was handed out yet.
    pub(super) fn new() -> Departures<T> {
        Departures { waiting: VecDeque::new(), first: 0 }
    }

    /// The number of the next one.
    #[inline]
    pub(super) fn upcoming(&self) -> u64 {
        self.first + self.waiting.len() as u64
    }

    /// Counts one more, of which nothing has to be waited for, if nothing waits before it; whether that is so.
    #[inline]
    pub(super) fn passes(&mut self) -> bool {
        if !self.waiting.is_empty() {
            return false;
        }
        self.first += 1;
        true
    }

    /// Counts one more, which is done already or will be.
    pub(super) fn push(&mut self, what: T, is_done: bool) {
        self.waiting.push_back((what, is_done));
    }

    /// Its rail is done with the one of that number.
    pub(super) fn done(&mut self, number: u64) {
        self.waiting[(number - self.first) as usize].1 = true;
    }

    /// The oldest, if it is done.
    pub(super) fn pop(&mut self) -> Option<T> {
        let (_, is_done) = self.waiting.front()?;
        if !is_done {
            return None;
        }
        self.first += 1;
        self.waiting.pop_front().map(|(what, _)| what)
    }

    /// All that is left, done or not, the oldest first.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = T> {
        self.first += self.waiting.len() as u64;
        self.waiting.drain(..).map(|(what, _)| what)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    /// Ring sizes of one to four rails, the number of the first note, and dice for everything else.
    fn worlds() -> impl Strategy<Value = (Vec<u16>, u16, Vec<(u8, u8)>)> {
        (prop::collection::vec(4u16..9, 1..=RAILS_MAX), 0..NUMBERS, prop::collection::vec(any::<(u8, u8)>(), 100..400))
    }

    /// Any rail whose bit the dice show.
    fn choose(dice: u8, rails: impl Iterator<Item = usize>) -> Option<usize> {
        let able: Vec<usize> = rails.collect();
        (!able.is_empty()).then(|| able[usize::from(dice) % able.len()])
    }

    proptest! {
        /// Whatever rail each note goes on, and however far one rail runs ahead of another: within the rings' credits everything
        /// is delivered, in order, and a sender is never stuck.
        #[test]
        fn notes_are_delivered_in_the_order_of_posting((rings, first, dice) in worlds()) {
            let mut arrivals = Arrivals { expected: first, ..Arrivals::new(rings.clone()) };
            let (mut flying, mut here) = (vec![VecDeque::new(); rings.len()], vec![VecDeque::new(); rings.len()]);
            let mut unread = vec![0u16; rings.len()];
            let (mut number, mut delivered) = (first, Vec::new());
            let mut sent = Vec::new();
            let mut land = |flying: &mut [VecDeque<u16>], unread: &mut [u16], rail: usize| {
                let landed = flying[rail].pop_front().unwrap();
                if arrivals.passes(rail, landed) {
                    unread[rail] -= 1;
                    delivered.push(landed);
                    if arrivals.is_empty() {
                        return;
                    }
                } else {
                    arrivals.arrived(rail, landed).unwrap();
                    here[rail].push_back(landed);
                }
                while let Some(rail) = arrivals.take().unwrap() {
                    unread[rail] -= 1;
                    delivered.extend(here[rail].pop_front());
                }
            };
            for (what, which) in dice {
                let with_credit = (0..rings.len()).filter(|rail| unread[*rail] < rings[*rail]);
                let with_flying = (0..rings.len()).filter(|rail| !flying[*rail].is_empty());
                if what % 2 == 0 && let Some(rail) = choose(which, with_credit) {
                    flying[rail].push_back(number);
                    unread[rail] += 1;
                    sent.push(number);
                    number = next(number);
                } else if let Some(rail) = choose(which, with_flying) {
                    land(&mut flying, &mut unread, rail);
                }
            }
            while let Some(rail) = (0..rings.len()).find(|rail| !flying[*rail].is_empty()) {
                land(&mut flying, &mut unread, rail);
            }
            prop_assert_eq!(sent, delivered);
            prop_assert!(unread.iter().all(|unread| *unread == 0));
        }

        /// A note that is left out: nothing behind it is delivered, and the path ends before anything is held beyond the rings.
        #[test]
        fn a_gap_is_found_within_the_rings((rings, first, dice) in worlds(), lost in 0usize..20) {
            let mut arrivals = Arrivals { expected: first, ..Arrivals::new(rings.clone()) };
            let (mut number, mut delivered) = (first, 0);
            let mut is_refused = false;
            for (at, (_, which)) in dice.iter().enumerate() {
                let rail = usize::from(*which) % rings.len();
                if at != lost && arrivals.arrived(rail, number).is_err() {
                    is_refused = true;
                    break;
                }
                number = next(number);
                match std::iter::from_fn(|| arrivals.take().transpose()).collect::<Result<Vec<_>, _>>() {
                    Ok(taken) => delivered += taken.len(),
                    Err(_) => {
                        is_refused = true;
                        break;
                    }
                }
            }
            prop_assert!(delivered <= lost, "{delivered} were delivered, and number {lost} never came");
            prop_assert!(is_refused, "nobody missed it");
        }

        /// Rails finish their own in order and each other's in any: reports come in the order of posting, each once.
        #[test]
        fn reports_come_in_the_order_of_posting(dice in prop::collection::vec(any::<(u8, u8)>(), 1..300), rails in 1usize..5) {
            let mut departures = Departures::new();
            let mut flying = vec![VecDeque::new(); rails];
            let (mut posted, mut reported) = (0u64, 0u64);
            for (what, which) in dice {
                let rail = usize::from(which) % rails;
                if what % 2 == 0 {
                    // Some have nothing to wait for.
                    match which % 3 {
                        0 if departures.passes() => {
                            prop_assert_eq!(reported, posted, "it overtakes another");
                            reported += 1;
                        }
                        0 => departures.push(posted, true),
                        _ => {
                            flying[rail].push_back(departures.upcoming());
                            departures.push(posted, false);
                        }
                    }
                    posted += 1;
                } else if let Some(number) = flying[rail].pop_front() {
                    departures.done(number);
                    while let Some(oldest) = departures.pop() {
                        prop_assert_eq!(oldest, reported);
                        prop_assert!(flying.iter().flatten().all(|number| *number > oldest), "it is still flying");
                        reported += 1;
                    }
                }
            }
            prop_assert!(departures.drain().eq(reported..posted));
        }
    }

    #[test]
    fn what_no_peer_may_send_is_refused() {
        let mut arrivals = Arrivals::new([4, 4]);
        assert!(arrivals.arrived(0, NUMBERS).is_err());
        for number in 1..5 {
            arrivals.arrived(0, number).unwrap();
        }
        assert_eq!(arrivals.take(), Ok(None), "number 0 may come on the other rail");
        assert!(arrivals.arrived(0, 5).unwrap_err().contains("full"));
        arrivals.arrived(1, 6).unwrap();
        assert!(arrivals.take().unwrap_err().contains("number 0 is missing"));
    }
}
