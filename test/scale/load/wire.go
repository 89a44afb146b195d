package load

import (
	"errors"

	"google.golang.org/protobuf/encoding/protowire"
)

// The few fields of discovery responses that a proxy's requests depend on are read
// straight from the encoding: decoding a response of thousands of clusters would
// cost the client more than making it costs the server, on the same cores.

const hcmType = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"

var errWire = errors.New("malformed protobuf")

// fields calls f for each field of b: v is a length-delimited field's content, n a
// varint's value.
func fields(b []byte, f func(num protowire.Number, v []byte, n uint64) error) error {
	for len(b) > 0 {
		num, typ, l := protowire.ConsumeTag(b)
		if l < 0 {
			return errWire
		}
		b = b[l:]
		var v []byte
		var n uint64
		switch typ {
		case protowire.BytesType:
			v, l = protowire.ConsumeBytes(b)
		case protowire.VarintType:
			n, l = protowire.ConsumeVarint(b)
		default:
			l = protowire.ConsumeFieldValue(num, typ, b)
		}
		if l < 0 {
			return errWire
		}
		b = b[l:]
		if typ == protowire.BytesType || typ == protowire.VarintType {
			if err := f(num, v, n); err != nil {
				return err
			}
		}
	}
	return nil
}

// each calls f with the contents of field num.
func each(b []byte, num protowire.Number, f func(v []byte) error) error {
	return fields(b, func(n protowire.Number, v []byte, _ uint64) error {
		if n == num && v != nil {
			return f(v)
		}
		return nil
	})
}

// first gives the content of the first of a length-delimited field num.
func first(b []byte, num protowire.Number) (content []byte) {
	_ = each(b, num, func(v []byte) error {
		if content == nil {
			content = v
		}
		return nil
	})
	return content
}

// header is what a response says besides its resources. The slices point into it.
type header struct {
	version, typeURL, nonce []byte
	resources               int
}

// parseHeader reads a DiscoveryResponse or a DeltaDiscoveryResponse: these fields
// have the same numbers in both.
func parseHeader(b []byte) (h header, err error) {
	err = fields(b, func(num protowire.Number, v []byte, _ uint64) error {
		switch num {
		case 1:
			h.version = v
		case 2:
			h.resources++
		case 4:
			h.typeURL = v
		case 5:
			h.nonce = v
		}
		return nil
	})
	return h, err
}

// resource is one of a response.
type resource struct {
	value   []byte
	aliases [][]byte // delta: other names that it was asked for by
}

// resources calls f with each of a response, and removed with each removed name.
func resources(b []byte, delta bool, f func(resource) error, removed func(name []byte)) error {
	return fields(b, func(num protowire.Number, v []byte, _ uint64) error {
		switch {
		case num == 2 && !delta:
			return f(resource{value: first(v, 2)})
		case num == 2:
			var r resource
			if err := fields(v, func(n protowire.Number, v []byte, _ uint64) error {
				switch n {
				case 2: // Resource.resource, an Any
					r.value = first(v, 2)
				case 4:
					r.aliases = append(r.aliases, v)
				}
				return nil
			}); err != nil {
				return err
			}
			return f(r)
		case num == 6 && delta:
			removed(v)
		}
		return nil
	})
}

// nameOf a resource: field 1 in each type that is used here.
func nameOf(b []byte) []byte { return first(b, 1) }

// edsName is the name under which a cluster's endpoints are asked for, or nil
// where the cluster is not of type EDS.
func edsName(cluster []byte) []byte {
	var name, service []byte
	eds := false
	_ = fields(cluster, func(num protowire.Number, v []byte, n uint64) error {
		switch num {
		case 1:
			name = v
		case 2:
			eds = n == 3 // Cluster.EDS
		case 3:
			service = first(v, 2)
		}
		return nil
	})
	if !eds {
		return nil
	}
	if len(service) > 0 {
		return service
	}
	return name
}

// isSplit tells whether a route configuration's virtual hosts come by themselves.
func isSplit(route []byte) bool { return first(route, 9) != nil }

// routeNames calls f with the name of each route configuration that a listener
// asks for.
func routeNames(listener []byte, f func(name []byte)) error {
	manager := func(typed []byte) error { // an Any
		if string(first(typed, 1)) != hcmType {
			return nil
		}
		return each(first(typed, 2), 3, func(rds []byte) error { // HttpConnectionManager.rds
			if name := first(rds, 2); name != nil {
				f(name)
			}
			return nil
		})
	}
	return fields(listener, func(num protowire.Number, v []byte, _ uint64) error {
		switch num {
		case 3, 25: // filter_chains, default_filter_chain
			return each(v, 3, func(filter []byte) error { return each(filter, 4, manager) })
		case 19: // api_listener
			return each(v, 1, manager)
		}
		return nil
	})
}

// addresses calls f with the address of each endpoint of an assignment.
func addresses(assignment []byte, f func(address []byte)) error {
	return each(assignment, 2, func(locality []byte) error {
		return each(locality, 2, func(lb []byte) error {
			// LbEndpoint.endpoint.address.socket_address.address
			if a := first(first(first(first(lb, 1), 1), 1), 2); a != nil {
				f(a)
			}
			return nil
		})
	})
}

// appendNames encodes names as the repeated string field num.
func appendNames(b []byte, num protowire.Number, names []string) []byte {
	for _, n := range names {
		b = protowire.AppendTag(b, num, protowire.BytesType)
		b = protowire.AppendString(b, n)
	}
	return b
}
