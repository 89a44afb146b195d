package resolve

import (
	"testing"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
)

func TestDistance(t *testing.T) {
	here := ir.From{Region: "eu", Zone: "a", Subzone: "1"}
	for _, tc := range []struct {
		name string
		from ir.From
		to   model.Locality
		want uint32
	}{
		{"same subzone", here, model.Locality{Region: "eu", Zone: "a", Subzone: "1"}, 0},
		{"other subzone", here, model.Locality{Region: "eu", Zone: "a", Subzone: "2"}, 1},
		{"other zone", here, model.Locality{Region: "eu", Zone: "b", Subzone: "1"}, 2},
		{"other region", here, model.Locality{Region: "us", Zone: "a", Subzone: "1"}, 3},
		{"endpoint somewhere", here, model.Locality{}, 3},
		{"asker somewhere", ir.From{}, model.Locality{Region: "eu", Zone: "a"}, 0},
		{"both somewhere", ir.From{}, model.Locality{}, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := distance(tc.from, tc.to); got != tc.want {
				t.Errorf("got %d, want %d", got, tc.want)
			}
		})
	}
}
