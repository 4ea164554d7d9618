//! The connections to a port that have not shown who they are: a bounded number, so that they cost little, and shared among the
//! addresses that they come from, so that a flood from one address closes only its own.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr};

/// Where a connection comes from, as far as places are shared: an IPv4 address, or the first half of an IPv6 address, since a single
/// host has all addresses with that half. `None` is this host, for a Unix socket.
type PlaceOwner = Option<IpAddr>;

fn owner(address: Option<IpAddr>) -> PlaceOwner {
    Some(match address?.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))),
        IpAddr::V4(address) => IpAddr::V4(address),
    })
}

struct PendingPlace<C> {
    number: u64,
    owner: PlaceOwner,
    connection: C,
}

/// The places of a port for connections that have not shown who they are.
pub struct PendingPlaces<C> {
    limit: usize,
    /// The oldest first.
    places: VecDeque<PendingPlace<C>>,
    given: u64,
}

impl<C> PendingPlaces<C> {
    /// This many places.
    pub fn new(limit: usize) -> Self {
        Self { limit, places: VecDeque::new(), given: 0 }
    }

    /// Gives a place to a connection from this address. Returns the place's number, and if there was no room the connection that
    /// has to be closed for it: the oldest of the address that, with the new one, has the most. If several have as many, the oldest
    /// of them all.
    pub fn give(&mut self, from: Option<IpAddr>, connection: C) -> (u64, Option<C>) {
        let owner = owner(from);
        let evicted = if self.places.len() >= self.limit { self.evict_for(owner) } else { None };
        self.given += 1;
        self.places.push_back(PendingPlace { number: self.given, owner, connection });
        (self.given, evicted)
    }

    fn evict_for(&mut self, newest: PlaceOwner) -> Option<C> {
        let mut held = BTreeMap::from([(newest, 1)]);
        for place in &self.places {
            *held.entry(place.owner).or_insert(0) += 1;
        }
        let most = held.values().max().copied();
        let oldest = self.places.iter().position(|place| held.get(&place.owner).copied() == most);
        // A new address that has the most has one place, as each of the others.
        self.places.remove(oldest.unwrap_or(0)).map(|place| place.connection)
    }

    /// Takes a place back, because its connection has ended or shown who it is.
    pub fn take_back(&mut self, number: u64) {
        self.places.retain(|place| place.number != number);
    }

    /// Takes back the places of connections that are not pending any more.
    pub fn retain(&mut self, is_pending: impl Fn(&C) -> bool) {
        self.places.retain(|place| is_pending(&place.connection));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(text: &str) -> Option<IpAddr> {
        Some(text.parse().expect("an address"))
    }

    /// Connects from each address in turn, and returns which were closed. A connection is called by its address and count.
    fn closed(places: &mut PendingPlaces<String>, addresses: &[&str]) -> Vec<String> {
        let give = |(n, address): (usize, &&str)| places.give(from(address), format!("{address} {n}")).1;
        addresses.iter().enumerate().filter_map(give).collect()
    }

    #[test]
    fn a_flood_closes_only_its_own_connections() {
        let mut places = PendingPlaces::new(4);
        assert_eq!(closed(&mut places, &["10.0.0.1"]), [""; 0]);
        let flood = closed(&mut places, &["10.0.0.9"; 1000]);
        assert_eq!(flood.len(), 997);
        assert_eq!(flood[..2], ["10.0.0.9 0", "10.0.0.9 1"]);
        assert!(flood.iter().all(|who| who.starts_with("10.0.0.9")));
        // A newcomer closes one of the flood, too.
        assert_eq!(closed(&mut places, &["10.0.0.2"]), ["10.0.0.9 997"]);
    }

    #[test]
    fn of_addresses_with_equally_many_the_oldest_connection_is_closed() {
        let mut places = PendingPlaces::new(4);
        assert_eq!(closed(&mut places, &["10.0.0.1", "10.0.0.2", "10.0.0.2", "10.0.0.1"]), [""; 0]);
        assert_eq!(closed(&mut places, &["10.0.0.3"]), ["10.0.0.1 0"]);
        // As many addresses as there are places: an address with a place gets no second one at the others' cost.
        let mut places = PendingPlaces::new(2);
        assert_eq!(
            closed(&mut places, &["10.0.0.1", "10.0.0.2", "10.0.0.2", "10.0.0.3"]),
            ["10.0.0.2 1", "10.0.0.1 0"]
        );
    }

    #[test]
    fn an_ipv6_host_is_one_address_and_unix_clients_are_one() {
        let mut six = PendingPlaces::new(3);
        assert_eq!(
            closed(&mut six, &["2001:db8::1", "2001:db8:0:1::1", "2001:db8::2", "2001:db8::3"]),
            ["2001:db8::1 0"]
        );
        assert_eq!(
            closed(&mut six, &["::ffff:10.0.0.1", "10.0.0.1"]),
            ["2001:db8::2 2", "::ffff:10.0.0.1 0"]
        );
        let mut places = PendingPlaces::new(3);
        for n in 0..5u64 {
            assert_eq!(places.give(None, n), (n + 1, n.checked_sub(3)));
        }
    }

    #[test]
    fn places_are_taken_back() {
        let mut places = PendingPlaces::new(2);
        let (first, _) = places.give(None, 1);
        places.give(None, 2);
        places.take_back(first);
        assert_eq!(places.give(None, 3).1, None);
        places.retain(|n| *n == 3);
        assert_eq!(places.give(None, 4).1, None);
        assert_eq!(places.give(None, 5).1, Some(3));
    }
}
