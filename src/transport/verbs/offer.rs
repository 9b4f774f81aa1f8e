//! What one end offers a peer: a queue pair on each of its rails, and each region's keys on them.
//!
//! Rail i here meets rail i there, or neither is used. Both ends see both offers, so both use the same rails without a message. A
//! rail whose port is down, or that is in doubt, keeps its place, and is not offered.
//!
//! Invariant: `Offer::parse(offer.to_string()) == offer`; two ends that meet each other's offers come to one answer.
#![forbid(unsafe_code)]

use std::fmt;

use super::{RAILS_MAX, address::Address};

/// The form of the text: its first part.
const FORM: &str = "3";

/// Regions of one transport: as many as the region table takes.
const REGIONS_MAX: usize = 256;

/// A region's key on each rail. The first is its name: notes carry it, whatever rail the payload goes on. 0 means none.
pub(super) type Keys = [u32; RAILS_MAX];

/// In the place of a rail: its port is down, or nothing came through on it.
const DOWN: &str = "down";

/// One end of a path that is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Offer {
    /// At least one that is up.
    pub(super) rails: Vec<Option<Address>>,
    /// Of every region that is registered by now; empty where there is one rail.
    pub(super) keys: Vec<Keys>,
}

/// Which rails a path uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Meeting {
    /// Their numbers, ascending; at least one.
    pub(super) rails: Vec<usize>,
    /// Which, and why not the others.
    pub(super) reason: String,
}

impl fmt::Display for Offer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{FORM};")?;
        for (at, rail) in self.rails.iter().enumerate() {
            f.write_str(if at == 0 { "" } else { "/" })?;
            match rail {
                Some(rail) => rail.fmt(f)?,
                None => f.write_str(DOWN)?,
            }
        }
        f.write_str(";")?;
        for (at, keys) in self.keys.iter().enumerate() {
            f.write_str(if at == 0 { "" } else { "/" })?;
            for (at, key) in keys[..self.rails.len()].iter().enumerate() {
                write!(f, "{}{key}", if at == 0 { "" } else { "," })?;
            }
        }
        Ok(())
    }
}

impl Offer {
    /// Reads what [`Offer`] displays.
    pub(super) fn parse(text: &str) -> Result<Offer, String> {
        let defect = |what: &str| {
            let shown: String = text.chars().take(200).collect();
            format!("`{}` is no address of verbs: {what}", shown.escape_debug())
        };
        let parts: Vec<&str> = text.split(';').take(4).collect();
        if parts[0] != FORM {
            return Err(defect("it is of another version"));
        }
        let [_, rails, keys] = parts[..] else { return Err(defect("it must have three parts")) };
        let rails: Vec<&str> = rails.split('/').take(RAILS_MAX + 1).collect();
        if rails.len() > RAILS_MAX {
            return Err(defect("it has too many rails"));
        }
        let rail = |text| if text == DOWN { Ok(None) } else { Address::parse(text).map(Some) };
        let rails = rails.into_iter().map(rail).collect::<Result<Vec<_>, _>>().map_err(|why| defect(&why))?;
        if rails.iter().all(Option::is_none) {
            return Err(defect("no rail of it is up"));
        }
        let regions: Vec<&str> = keys.split('/').filter(|_| !keys.is_empty()).take(REGIONS_MAX + 1).collect();
        if regions.len() > REGIONS_MAX {
            return Err(defect("it has too many regions"));
        }
        let keys = regions.into_iter().map(|region| parse_keys(region, rails.len()));
        let keys =
            keys.collect::<Option<_>>().ok_or_else(|| defect("a region's keys are not a number for each rail"))?;
        Ok(Offer { rails, keys })
    }

    /// The rails that a path between the two uses, or why there is none. The same answer at both.
    pub(super) fn meet(&self, remote: &Offer) -> Result<Meeting, String> {
        let (mut rails, mut reasons, mut refusals) = (Vec::new(), Vec::new(), Vec::new());
        for (number, (ours, theirs)) in self.rails.iter().zip(&remote.rails).enumerate() {
            let judged = match (ours, theirs) {
                (Some(ours), Some(theirs)) => ours.judge(theirs),
                _ => Err("one end does not offer it: its port is down, or nothing came through on it".into()),
            };
            match judged {
                Ok(why) => {
                    rails.push(number);
                    reasons.push(why);
                }
                Err(why) => refusals.push((number, why)),
            }
        }
        let (fewer, more) = (self.rails.len().min(remote.rails.len()), self.rails.len().max(remote.rails.len()));
        if rails.is_empty() {
            return Err(refusals.into_iter().map(|(_, why)| why).collect::<Vec<_>>().join("; "));
        }
        let mut reason = reasons.join(", and ");
        if more > 1 {
            reason = format!("{} of {more} rails: {reason}", rails.len());
        }
        refusals.iter().for_each(|(number, why)| reason.push_str(&format!("; not rail {number}: {why}")));
        if fewer < more {
            reason.push_str(&format!("; one end has {fewer} only"));
        }
        Ok(Meeting { rails, reason })
    }
}

fn parse_keys(text: &str, rails: usize) -> Option<Keys> {
    let mut keys = Keys::default();
    let mut parts = text.split(',');
    for key in &mut keys[..rails] {
        let digits = parts.next().filter(|digits| !digits.starts_with('+'))?;
        *key = digits.parse().ok().filter(|key| *key != 0)?;
    }
    parts.next().is_none().then_some(keys)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::verbs::address::{Gid, Link};

    fn rail(last: u8, link: Link) -> Address {
        let mut gid = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 9, 0, 0];
        gid[15] = last;
        Address { link, gid: Gid(gid), lid: 0, qpn: last.into(), psn: 9, mtu: 5, ring_rkey: 7, ring_entries: 256 }
    }

    fn offer(rails: &[Address]) -> Offer {
        Offer { rails: rails.iter().copied().map(Some).collect(), keys: Vec::new() }
    }

    #[test]
    fn round_trip() {
        let both = [rail(1, Link::RoceV2), rail(2, Link::InfiniBand)];
        for keys in [vec![], vec![[5, u32::MAX, 0, 0]], vec![[5, 6, 0, 0], [7, 8, 0, 0]]] {
            let offer = Offer { keys, ..offer(&both) };
            assert_eq!(Offer::parse(&offer.to_string()).unwrap(), offer);
        }
        let half = Offer { rails: vec![None, Some(both[1])], keys: vec![[5, 6, 0, 0]] };
        assert_eq!(Offer::parse(&half.to_string()).unwrap(), half);
        let one = offer(&both[..1]);
        assert_eq!(Offer::parse(&one.to_string()).unwrap(), one);
    }

    #[test]
    fn what_is_no_offer_is_refused_in_words() {
        let rail = rail(1, Link::RoceV2).to_string();
        let many = [rail.as_str(); RAILS_MAX + 1].join("/");
        let regions = vec!["1"; REGIONS_MAX + 1].join("/");
        let wrong = [
            String::new(),
            "3".into(),
            format!("3;{rail}"),
            format!("1;{rail};"),
            format!("3;{rail};;"),
            format!("3;{rail}/;"),
            "3;down;".into(),
            "3;down/down;".into(),
            format!("3;{rail}/up;"),
            format!("3;{many};"),
            format!("3;{rail};0"),
            format!("3;{rail};+1"),
            format!("3;{rail};1,2"),
            format!("3;{rail}/{rail};1"),
            format!("3;{rail};1/"),
            format!("3;{rail};4294967296"),
            format!("3;{rail};{regions}"),
            ";".repeat(100_000),
            format!("3;{};", "/".repeat(100_000)),
        ];
        for text in wrong {
            let error = Offer::parse(&text).expect_err(&text);
            assert!(error.contains("no address of verbs") && error.len() < 1000, "{error}");
        }
    }

    #[test]
    fn both_ends_use_the_same_rails() {
        let (a, b, c) = (rail(1, Link::RoceV2), rail(2, Link::RoceV2), rail(3, Link::RoceV1));
        let cases: [(&[Address], &[Address], &[usize]); 6] = [
            (&[a], &[b], &[0]),
            (&[a, b], &[b, a], &[0, 1]),
            (&[a, b], &[b], &[0]),
            (&[c, a], &[b, b], &[1]),
            (&[a, c, b], &[b, b, a, a], &[0, 2]),
            (&[a], &[c], &[]),
        ];
        for (here, there, rails) in cases {
            let [here, there] = [here, there].map(offer);
            let (ours, theirs) = (here.meet(&there), there.meet(&here));
            assert_eq!(ours.as_ref().map_or(&[][..], |meeting| &meeting.rails), rails);
            assert_eq!(ours.map(|meeting| meeting.rails).ok(), theirs.map(|meeting| meeting.rails).ok());
        }
        assert_eq!(offer(&[a]).meet(&offer(&[b])).unwrap().reason, "RoCE v2 from 10.9.0.1 to 10.9.0.2");
        // A rail that is down at one end keeps its place.
        let halves = [vec![None, Some(a)], vec![Some(b), Some(b)], vec![Some(b), None]];
        let [first_down, both, second_down] = halves.map(|rails| Offer { rails, keys: Vec::new() });
        for (here, there) in [(&first_down, &both), (&both, &first_down)] {
            let meeting = here.meet(there).unwrap();
            assert_eq!(meeting.rails, [1]);
            assert!(
                meeting.reason.contains("1 of 2 rails") && meeting.reason.contains("; not rail 0: "),
                "{meeting:?}"
            );
        }
        assert!(first_down.meet(&second_down).unwrap_err().contains("down"));
        let told = offer(&[a, c, b]).meet(&offer(&[b, b, a, a])).unwrap().reason;
        assert!(
            told.starts_with("2 of 4 rails: ") && told.contains("; not rail 1: ") && told.ends_with("has 3 only"),
            "{told}"
        );
    }
}
