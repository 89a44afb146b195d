package discovery

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/render"
	"isthmus.dev/internal/resolve"
	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

// routeTables renders route tables in two forms, of virtual hosts that are
// rendered one by one: whole, for any client, and split, for those that take each
// virtual host as a resource (xds.SplitRoutesFeature). A table may have thousands,
// of which a change concerns one. Who has no client of a form does not pay for it.
type routeTables struct {
	inline *store.Rule[*ir.VirtualHost, renderedHost]
	part   *store.Rule[ir.RouteTablePartKey, renderedPart]
	host   *store.Rule[hostKey, *xds.Resource]
}

// renderedHost is a virtual host as it is in a route configuration's bytes.
type renderedHost struct {
	bytes []byte
	hash  [sha256.Size]byte
}

// renderedPart is virtual hosts that follow each other, and their hashes.
type renderedPart struct {
	hosts  [][]byte
	hashes []byte
	size   int
}

// hostKey is a virtual host as a resource of its own.
type hostKey struct {
	table string
	host  *ir.VirtualHost
}

func newRouteTables() routeTables {
	t := routeTables{
		inline: store.NewRule("rendered inline virtual host",
			func(a, b renderedHost) bool { return a.hash == b.hash },
			func(_ *store.Reader, h *ir.VirtualHost) renderedHost { return inlineHost(h) }),
		host: Rendered("virtual host", func(_ *store.Reader, k hostKey) *xds.Resource {
			h := render.VirtualHost(k.table, k.host)
			if h == nil {
				return nil
			}
			return NewResource(xds.VirtualHostType, h.Name, h)
		}),
	}
	t.part = store.NewRule("rendered part of a route table",
		func(a, b renderedPart) bool { return bytes.Equal(a.hashes, b.hashes) },
		func(r *store.Reader, k ir.RouteTablePartKey) renderedPart {
			var out renderedPart
			for _, h := range store.Eval(r, resolve.RouteTablePart, k) {
				rendered := store.Eval(r, t.inline, h)
				out.hosts = append(out.hosts, rendered.bytes)
				out.hashes = append(out.hashes, rendered.hash[:]...)
				out.size += len(rendered.bytes)
			}
			return out
		})
	return t
}

// virtualHostsField is RouteConfiguration.virtual_hosts.
const virtualHostsField protowire.Number = 2

func inlineHost(h *ir.VirtualHost) renderedHost {
	var out []byte
	// The table's own last one is not among them: whole adds it.
	one := render.RouteTable(&ir.RouteTable{VirtualHosts: []*ir.VirtualHost{h}})
	for _, h := range one.VirtualHosts[:len(one.VirtualHosts)-1] {
		b, err := proto.MarshalOptions{Deterministic: true}.Marshal(h)
		if err != nil {
			panic(fmt.Errorf("marshal virtual host %s: %w", h.Name, err))
		}
		out = protowire.AppendTag(out, virtualHostsField, protowire.BytesType)
		out = protowire.AppendBytes(out, b)
	}
	return renderedHost{out, sha256.Sum256(out)}
}

// whole puts a table together of its parts.
func (t routeTables) whole(r *store.Reader, k ir.RouteTableKey) *xds.Resource {
	layout := store.Eval(r, resolve.RouteTableLayoutOf, k)
	if layout == nil {
		return nil
	}
	// What the table has besides, which may be a last virtual host for what is
	// unknown. Fields may come in any order, and those of a list are put together.
	rest := NewResource(xds.RouteType, layout.Name, render.RouteTable(&ir.RouteTable{Name: layout.Name, Passthrough: layout.Passthrough}))
	sum, size := sha256.New(), len(rest.Body.Value)
	parts := make([]renderedPart, len(layout.Parts))
	for i, key := range layout.Parts {
		parts[i] = store.Eval(r, t.part, key)
		size += parts[i].size
		sum.Write(parts[i].hashes)
	}
	sum.Write([]byte(rest.Version))
	b := slices.Grow([]byte(nil), size)
	for _, part := range parts {
		for _, h := range part.hosts {
			b = append(b, h...)
		}
	}
	b = append(b, rest.Body.Value...)
	return &xds.Resource{Name: layout.Name, Version: hex.EncodeToString(sum.Sum(nil)[:8]),
		Body: &anypb.Any{TypeUrl: xds.RouteType, Value: b}}
}

// renderSplitTable gives a table without its virtual hosts.
func renderSplitTable(r *store.Reader, k ir.RouteTableKey) *xds.Resource {
	layout := store.Eval(r, resolve.RouteTableLayoutOf, k)
	if layout == nil {
		return nil
	}
	table := &ir.RouteTable{Name: layout.Name, Passthrough: layout.Passthrough}
	return NewResource(xds.RouteType, layout.Name, render.SplitRouteTable(table))
}

// hosts gives the virtual hosts of a part of a split table.
func (t routeTables) hosts(r *store.Reader, k ir.RouteTablePartKey) Bundle {
	hosts := store.Eval(r, resolve.RouteTablePart, k)
	table := strconv.FormatUint(uint64(k.Table.Port), 10)
	out := make(Bundle, 0, len(hosts))
	for _, h := range hosts {
		if rendered := store.Eval(r, t.host, hostKey{table, h}); rendered != nil {
			out = append(out, rendered)
		}
	}
	return out
}
